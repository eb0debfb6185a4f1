"""What the pages share that people open in a browser: one file each, which reaches for nothing outside itself."""

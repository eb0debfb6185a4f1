"""Two runs side by side, record by record: what changed, how much, and whether it is better."""

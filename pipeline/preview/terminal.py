"""Text of models and datasets on a terminal: labelled, flushed as it comes, and unable to steer the terminal."""

from __future__ import annotations

from typing import TextIO

from pipeline.shown import printable

LABEL_WIDTH = 9  # its blank included


class Terminal:
    """Lines that begin with a label. Further lines of a text are indented, so that no text can forge a label."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def line(self, label: str, text: str) -> None:
        """One labelled text, whole."""
        self.begin(label)
        self.add(text)
        self.end()

    def begin(self, label: str) -> None:
        """Start a labelled text that comes in pieces."""
        self._write(f"{label:{LABEL_WIDTH - 1}} ")

    def add(self, piece: str) -> None:
        """The next piece; it is seen at once, piped or not."""
        self._write(printable(piece).replace("\n", "\n" + " " * LABEL_WIDTH))

    def end(self) -> None:
        """End the text, or with nothing begun leave a blank line."""
        self._write("\n")

    def _write(self, text: str) -> None:
        encoding = self._out.encoding or "utf-8"
        self._out.write(text.encode(encoding, "backslashreplace").decode(encoding))
        self._out.flush()

"""Single keys of a terminal, without Enter and without an echo that would run over the screen."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Any

_VSUSP, _DISABLED = termios.VSUSP, b"\0"
SUSPEND = "\x1a"  # Ctrl-Z, which comes as a key so that the screen can be left first; Ctrl-C stays a signal


class Keyboard:
    """While it is entered, keys can be waited for. Where stdin is no terminal there are none."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._before: list[Any] = []

    def __enter__(self) -> Keyboard:
        if self._fd is not None:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
            changed = termios.tcgetattr(self._fd)
            changed[6][_VSUSP] = _DISABLED
            termios.tcsetattr(self._fd, termios.TCSANOW, changed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._fd is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def pressed(self, within_seconds: float) -> str:
        """The keys that were pressed, as soon as there is one; empty where none was for so long."""
        if self._fd is None:
            time.sleep(within_seconds)
            return ""
        readable, _, _ = select.select([self._fd], [], [], within_seconds)
        if not readable:
            return ""
        found = os.read(self._fd, 64)
        if not found:  # the terminal is gone
            self._fd = None
        return found.decode("utf-8", "replace")

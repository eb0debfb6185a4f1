"""A terminal to look at: what a person would see of it (pyte), and a real pseudo-terminal for a command."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from io import StringIO
from types import TracebackType
from typing import Any

import pyte
from command_line import CHECKOUT
from rich.console import Console

from pipeline.watch.observer import Look
from pipeline.watch.screen import Screen


def seen(look: Look, width: int = 80, height: int = 24, idle_seconds: float = 300.0) -> list[str]:
    """The lines that a person sees of a look."""
    out = StringIO()
    console = Console(
        file=out, width=width, height=height, force_terminal=True, color_system="standard", legacy_windows=False,
        markup=False, highlight=False, emoji=False, _environ={},
    )  # fmt: skip
    console.print(Screen(look, idle_seconds), end="")
    screen = pyte.Screen(width, height)
    pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display]


class Session:
    """A command in a pseudo-terminal of its own."""

    def __init__(self, *words: str, width: int = 80, height: int = 24, term: str = "xterm-256color") -> None:
        self._controller, self._terminal = pty.openpty()
        self.screen = pyte.Screen(width, height)
        self._stream = pyte.ByteStream(self.screen)
        self.written = b""
        self._resize(width, height)
        self.modes = termios.tcgetattr(self._terminal)
        self._process = subprocess.Popen(
            words,
            stdin=self._terminal,
            stdout=self._terminal,
            stderr=self._terminal,
            cwd=CHECKOUT,
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            | {"TERM": term},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C comes as a signal
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: Any, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._controller)
        os.close(self._terminal)

    def wait_for(self, text: str, seconds: float = 60.0) -> list[str]:
        """The lines on the screen once one of them has the text."""
        deadline = time.monotonic() + seconds
        while not any(text in line for line in self.lines()):
            assert time.monotonic() < deadline, f"{text!r} is not on the screen:\n" + "\n".join(self.lines())
            self._read(0.1)
        return self.lines()

    def wait_until(self, happened: Callable[[], bool], seconds: float = 60.0) -> None:
        """Until something is so; what is written meanwhile is read."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, "it did not happen:\n" + "\n".join(self.lines())
            self._read(0.1)

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    def press(self, keys: bytes) -> None:
        os.write(self._controller, keys)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def resize(self, width: int, height: int) -> None:
        self.screen.resize(height, width)
        self.screen.reset()
        self._resize(width, height)

    def ended(self, seconds: float = 60.0) -> int:
        """The exit code; all that was written is read."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            assert time.monotonic() < deadline, "it goes on:\n" + "\n".join(self.lines())
            self._read(0.1)
        while self._read(0.1):
            pass
        return self._process.returncode

    @property
    def modes_now(self) -> list[Any]:
        return termios.tcgetattr(self._terminal)

    def _resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def _read(self, seconds: float) -> bool:
        if not select.select([self._controller], [], [], seconds)[0]:
            return False
        found = os.read(self._controller, 65536)
        self.written += found
        self._stream.feed(found)
        return bool(found)

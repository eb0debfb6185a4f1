"""Where looks are shown: the whole screen of a terminal, or lines where there is none."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live

from pipeline.shown import shown
from pipeline.status import Status, status_lines
from pipeline.watch.keyboard import SUSPEND, Keyboard
from pipeline.watch.observer import Look
from pipeline.watch.screen import Screen
from pipeline.write.file import Place

_REFRESHES_PER_SECOND = 2  # for times that go on, and a terminal that was resized


class View(Protocol):
    """Shows one look after the other, while it is entered."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def show(self, look: Look, status: Status) -> None: ...

    def wait(self, seconds: float) -> bool:
        """Let time pass; False where whoever looks has seen enough."""
        ...


def view_of(output_dir: Place, idle_seconds: float) -> View:
    """What suits stdout."""
    console = Console(markup=False, highlight=False, emoji=False)
    if sys.stdout.isatty() and not console.is_dumb_terminal:
        return LiveView(console, idle_seconds)
    return Lines(output_dir)


class Lines:
    """A few lines for each look, for a pipe, a file or a terminal without a cursor."""

    def __init__(self, output_dir: Place) -> None:
        self._output_dir, self._num_shown = output_dir, 0

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, at: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def show(self, look: Look, status: Status) -> None:
        """See View."""
        lines = [f"problem  {look.problem}; trying again"] if look.problem else status_lines(self._output_dir, status)
        print(shown(("\n" if self._num_shown else "") + "\n".join(lines)), flush=True)
        self._num_shown += 1

    def wait(self, seconds: float) -> bool:
        """See View."""
        time.sleep(seconds)
        return True


class LiveView:
    """The other screen of the terminal, which is left as it was however this ends: q, Ctrl-C, SIGTERM, Ctrl-Z."""

    def __init__(self, console: Console, idle_seconds: float) -> None:
        self._console, self._idle_seconds = console, idle_seconds
        self._live = Live(console=console, screen=True, refresh_per_second=_REFRESHES_PER_SECOND)
        self._keyboard = Keyboard()
        self._entered = ExitStack()
        self._screen: Screen | None = None

    def __enter__(self) -> LiveView:
        before = signal.signal(signal.SIGTERM, _end)
        self._entered.callback(signal.signal, signal.SIGTERM, before)
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, at: TracebackType | None
    ) -> None:
        self._close()
        self._entered.close()

    def show(self, look: Look, status: Status) -> None:
        """See View."""
        if self._screen is None:
            self._screen = Screen(look, self._idle_seconds)
        self._screen.look = look
        self._live.update(self._screen, refresh=True)

    def wait(self, seconds: float) -> bool:
        """See View."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            keys = self._keyboard.pressed(left)
            if "q" in keys or "Q" in keys:
                return False
            if SUSPEND in keys:
                self._suspend()
        return True

    def _open(self) -> None:
        self._keyboard.__enter__()
        self._live.start(refresh=self._screen is not None)

    def _close(self) -> None:
        self._live.stop()
        self._keyboard.__exit__(None, None, None)

    def _suspend(self) -> None:
        self._close()
        os.kill(0, signal.SIGTSTP)  # the whole job, as the terminal does it; goes on here after `fg`
        self._open()


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)

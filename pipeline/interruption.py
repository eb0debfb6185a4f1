"""Signals: the first one asks the run to end in good order, within a grace period."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from pipeline.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_AT_ONCE = "Ctrl-C three times exits at once."
_MARGIN_SECONDS = 5.0  # a batch that no check of `expired` interrupts is given up after this


class Interruption:
    """While it is entered, SIGTERM, SIGUSR1 and SIGINT are requests to stop; the third SIGINT exits at once.

    `last_words` runs if the grace period ends while the run is deep in a computation: it brings what is finished to
    disk, then the process ends with exit code 75.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._deadline: float | None = None
        self._num_interrupts = 0
        self._on_request: list[Callable[[], None]] = []
        self.last_words: Callable[[], None] = lambda: None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        return self._deadline is not None

    @property
    def expired(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def check(self) -> None:
        """Raise if a stop was requested.

        Raises:
            Interrupted: with the way to go on.
        """
        if self.requested:
            raise Interrupted("Stopped by a signal; what is finished is on disk. Run the same command again to go on.")

    def on_request(self, action: Callable[[], None]) -> None:
        """Call `action` when a stop is requested; at once if it was requested already."""
        self._on_request.append(action)
        if self.requested:
            action()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # A second signal may come while the process is on its way out with exit code 75: it changes nothing.
            signal.signal(number, signal.SIG_IGN if self.requested else handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts >= 3:
                os._exit(Interrupted.exit_code)
        if self._deadline is not None:
            return
        self._deadline = time.monotonic() + self._grace_seconds
        # Not print(): a handler may interrupt another write to the same stream.
        os.write(
            2, f"\n{signal.Signals(number).name}: stopping, within {self._grace_seconds:g} s. {_AT_ONCE}\n".encode()
        )
        timer = threading.Timer(self._grace_seconds + _MARGIN_SECONDS, self.give_up)
        timer.daemon = True
        timer.start()
        for action in self._on_request:
            action()

    def give_up(self) -> None:
        """End the process with exit code 75, whatever it is deep in; `last_words` have the grace period once more."""
        words = threading.Thread(target=self.last_words, name="last words", daemon=True)
        words.start()
        words.join(self._grace_seconds + _MARGIN_SECONDS)  # a disk that hangs may be why it has to end
        os._exit(Interrupted.exit_code)

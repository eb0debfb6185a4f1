"""How fast something was counted lately, not since its beginning: what a run does now, and when it will be through."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 120.0  # long enough for answers that come in batches, short enough to show a change


class Pace:
    """A count at several times, kept as long as the window."""

    def __init__(self, window_seconds: float = WINDOW_SECONDS) -> None:
        self._window_seconds = window_seconds
        self._noted: deque[tuple[float, float]] = deque()

    def note(self, time: float, count: float) -> None:
        """The count at a time in seconds, later than the one noted before; the same time again changes nothing."""
        if self._noted and time <= self._noted[-1][0]:
            return
        self._noted.append((time, count))
        while len(self._noted) > 2 and time - self._noted[1][0] >= self._window_seconds:
            self._noted.popleft()

    @property
    def seconds(self) -> float:
        """What the rate is measured over; 0 where nothing is known yet."""
        return self._noted[-1][0] - self._noted[0][0] if self._noted else 0.0

    @property
    def per_second(self) -> float | None:
        """The rate; None where the count is known at one time alone."""
        if len(self._noted) < 2:
            return None
        return (self._noted[-1][1] - self._noted[0][1]) / self.seconds

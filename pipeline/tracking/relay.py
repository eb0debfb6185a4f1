"""Between a worker and its trackers: a tracker that is slow, hangs or fails costs its figures, never a row."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from pipeline.tracking.base import Figures, Tracker

log = logging.getLogger(__name__)

_LAST_SECONDS = 10.0  # that a run's end waits for its trackers


class Relay:
    """Tells one tracker the latest figures, in a thread of its own; figures that it is too slow for are left out.

    Args:
        name: as the user knows the tracker.
        open_tracker: makes it, in that thread, once there are figures: it may take long, or wait for a network.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]) -> None:
        self._name, self._open = name, open_tracker
        self._latest: Figures | None = None
        self._closing = False
        self._failed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)

    def tell(self, figures: Figures) -> None:
        """Have the tracker told, soon."""
        with self._changed:
            if self._thread.ident is None:
                self._thread.start()
            self._latest = figures
            self._changed.notify()

    def close(self) -> None:
        """What was told last is the last word. Does not wait; see ended()."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def ended(self, within_seconds: float) -> bool:
        """Whether the tracker has all of it and is closed, after at most so long."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, within_seconds))
        return not self._thread.is_alive()

    def warn(self, problem: object) -> None:
        """Say once that something is wrong."""
        if not self._failed:
            log.warning("%s: %s; the run goes on without it", self._name, problem)
        self._failed = True

    def _run(self) -> None:
        # Whatever a tracker's library raises, here and below: the run has nothing to do with it.
        try:
            tracker = self._open()
        except Exception as problem:
            self.warn(_said(problem))
            return
        while (figures := self._next()) is not None:
            try:
                tracker.log(figures)
            except Exception as problem:  # a full disk may have room again: the next figures are tried
                self.warn(_said(problem))
        try:
            tracker.close()
        except Exception as problem:
            self.warn(_said(problem))

    def _next(self) -> Figures | None:
        """The latest figures once there are new ones; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._latest is not None or self._closing)
            figures, self._latest = self._latest, None
            return figures


def close_all(relays: Sequence[Relay]) -> None:
    """End all relays, within 10 seconds together."""
    for relay in relays:
        relay.close()
    deadline = time.monotonic() + _LAST_SECONDS
    for relay in relays:
        if not relay.ended(deadline - time.monotonic()):
            relay.warn(f"it did not take its last figures within {_LAST_SECONDS:g} s")


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"

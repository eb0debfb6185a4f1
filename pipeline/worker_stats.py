"""What the workers of a run say of themselves: stats/worker-RANK-*.json, one for each start of a worker."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from pipeline.write.claim import is_alive
from pipeline.write.file import Place
from pipeline.write.object_store import ObjectPath
from pipeline.write.seen import SeenFiles

HEARTBEAT_SECONDS = 5.0
_HEARTBEAT_SECONDS_OF_OBJECTS = 30.0  # each one is a request
_NUM_MISSED = 6  # heartbeats after which a worker is taken for dead
_MOST_POINTS = 120  # of a series: it is in every heartbeat

WorkerStats = Mapping[str, Any]


def heartbeat_seconds(stats_dir: Place) -> float:
    """How often a worker is to be heard of there."""
    return _HEARTBEAT_SECONDS_OF_OBJECTS if isinstance(stats_dir, ObjectPath) else HEARTBEAT_SECONDS


class WorkerStatsFiles:
    """The files of all workers of a run; those that have not changed since the last look are not read again."""

    def __init__(self, stats_dir: Place) -> None:
        self._stats_dir = stats_dir
        self._seen = SeenFiles(_content)

    def read(self, plan_id: str) -> list[WorkerStats]:
        """Of all workers of a plan, dead or alive, in no order; `name` is of this start of a worker alone."""
        found = self._seen.read(self._stats_dir.glob("worker-*.json"))
        return [content for content in found.values() if content.get("plan_id") == plan_id]


def _content(path: Place) -> WorkerStats:
    """Empty where it is not ours, or being replaced on a file system that shows it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content | {"name": path.stem} if isinstance(content, dict) else {}


def is_running(worker: WorkerStats) -> bool:
    """Whether it is at work now, as far as is known."""
    return (
        worker["state"] in ("loading", "running")
        and time.time() - worker["updated"] < _NUM_MISSED * worker.get("heartbeat_seconds", HEARTBEAT_SECONDS)
        and (worker["host"] != socket.gethostname() or is_alive(worker["pid"]))
    )


class Series:
    """Figures of a worker over time: a point a second, and as the run gets longer one in 2, 4, 8 ... seconds.

    names: of the figures; the first is the time in seconds.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._points: list[tuple[float, ...]] = []
        self._step_seconds = 1.0
        self._lock = threading.Lock()  # answers and heartbeats come from two threads

    def add(self, *values: float) -> None:
        """A point, unless the last one is too near."""
        with self._lock:
            if self._points and values[0] - self._points[-1][0] < self._step_seconds:
                return
            self._points.append(values)
            if len(self._points) >= _MOST_POINTS:
                del self._points[1::2]
                self._step_seconds *= 2

    def until(self, *values: float) -> dict[str, list[float]]:
        """All points, and these values as the last one: by name of the figure."""
        with self._lock:
            points = [*(point for point in self._points if point[0] < values[0]), values]
        return {name: [round(value, 1) for value in column] for name, *column in zip(self._names, *points, strict=True)}

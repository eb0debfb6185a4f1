"""How fast a run was over time, from what its workers say of themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.worker_stats import WorkerStats

Numbers = np.ndarray[Any, Any]

_MOST_BINS = 80
_LEAST_BIN_SECONDS = 1.0
_GAP_SECONDS = 60.0  # in which nobody was at work: a longer one is left out


@dataclass(frozen=True, slots=True)
class Throughput:
    """Of all workers together, in steps of equal length. Time is that in which any worker was there."""

    edges_seconds: Numbers
    rows_per_second: Numbers
    waiting_share: Numbers  # of the workers' time, for input
    breaks_seconds: tuple[float, ...]  # where time without any worker was left out


def throughput(workers: Iterable[WorkerStats]) -> Throughput | None:
    """The throughput of the starts of workers; None where nothing was answered."""
    starts = [worker for worker in workers if worker["seconds"] > 0 and worker["num_answered"] > 0]
    if not starts:
        return None
    sessions = _sessions([(worker["started"], worker["started"] + worker["seconds"]) for worker in starts])
    lengths = [end - begin for begin, end in sessions]
    offsets = [0.0, *itertools.accumulate(lengths)]
    num_bins = int(np.clip(offsets[-1] / _LEAST_BIN_SECONDS, 1, _MOST_BINS))
    edges = np.linspace(0.0, offsets[-1], num_bins + 1)
    rows, waited, there = np.zeros(num_bins), np.zeros(num_bins), np.zeros(num_bins)
    for worker in starts:
        number = next(number for number, (_, end) in enumerate(sessions) if worker["started"] <= end)
        began = offsets[number] + worker["started"] - sessions[number][0]
        seconds, answered, waiting = _series(worker)
        rows += np.diff(np.interp(edges, began + seconds, answered))
        waited += np.diff(np.interp(edges, began + seconds, waiting))
        there += np.diff(np.clip(edges, began, began + worker["seconds"]))
    width = edges[1] - edges[0]
    share = np.divide(waited, there, out=np.zeros(num_bins), where=there > 0)
    return Throughput(edges, rows / width, np.clip(share, 0, 1), tuple(offsets[1:-1]))


def _series(worker: WorkerStats) -> tuple[Numbers, Numbers, Numbers]:
    """Seconds since a worker's start, rows answered and seconds waited until then."""
    series = worker.get("series") or {
        "seconds": [worker["loading_seconds"], worker["seconds"]],
        "num_answered": [0, worker["num_answered"]],
        "waiting_for_input_seconds": [0.0, worker["waiting_for_input_seconds"]],
    }
    return tuple(np.array(series[name], float) for name in ("seconds", "num_answered", "waiting_for_input_seconds"))  # type: ignore[return-value]


def _sessions(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Times in which somebody was at work, gaps of a minute included."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1] + _GAP_SECONDS:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged

"""What trackers are told of a run, and how they are asked: TensorBoard, Weights & Biases, a file for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol

from pipeline.worker_stats import WorkerStats


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What all workers of a run do, as rank 0 knows it from their heartbeats. The fields are names of curves."""

    rows_done: int  # records, those of earlier starts included; two workers may have answered the same one
    errors: int
    workers: int  # at work now
    rows_per_second: float  # over the last two minutes
    tokens_per_second: float  # generated tokens, likewise
    waiting_share: float  # of the time since the models were loaded: waiting for input
    memory_bytes: int  # resident, of the workers' main processes


@dataclass(frozen=True, slots=True)
class Figures:
    """A heartbeat."""

    worker: WorkerStats  # of the worker that tells it
    num_records: int  # of the plan
    run: RunFigures | None  # None but at rank 0


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """The run that is tracked, for a tracker's own records."""

    output_dir: str  # without credentials
    name: str  # of the output folder
    plan_id: str
    folder: str | None  # for the tracker's files; None = where it puts them by itself
    settings: dict[str, Any]  # those of the plan


class Tracker(Protocol):
    """Where figures go. Called by one thread, which nothing waits for; what it raises is said once."""

    def log(self, figures: Figures) -> None:
        """Take the figures of a heartbeat."""
        ...

    def close(self) -> None:
        """Bring what was taken to where it belongs."""
        ...


class RunTracker(Tracker, Protocol):
    """A tracker that rank 0 alone has, chosen by `track=`."""

    needs_folder: ClassVar[bool]

    def __init__(self, run: TrackedRun) -> None: ...

    @staticmethod
    def refuse() -> None:
        """Refuse what cannot work here, before a model loads.

        Raises:
            UsageError: its package is not installed, or what it needs is not in the environment.
        """
        ...


def is_installed(package: str) -> bool:
    """Whether a package is there; a folder of that name, as wandb leaves in the one it is started in, is none."""
    found = find_spec(package)
    return found is not None and found.origin is not None

"""What the workers of a run say of themselves: stats/worker-RANK-*.json, one for each start of a worker."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.write.claim import is_alive

HEARTBEAT_SECONDS = 5.0
# A worker that has not been heard of for this long is taken for dead.
_SILENCE_SECONDS = 6 * HEARTBEAT_SECONDS

WorkerStats = Mapping[str, Any]


def read_worker_stats(stats_dir: Path, plan_id: str) -> Iterator[WorkerStats]:
    """Of all workers of a plan, dead or alive, in no order; `name` is of this start of a worker alone."""
    for path in stats_dir.glob("worker-*.json"):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # not ours, or being replaced on a file system that shows it
        if content.get("plan_id") == plan_id:
            yield content | {"name": path.stem}


def is_running(worker: WorkerStats) -> bool:
    """Whether it is at work now, as far as is known."""
    return (
        worker["state"] in ("loading", "running")
        and time.time() - worker["updated"] < _SILENCE_SECONDS
        and (worker["host"] != socket.gethostname() or is_alive(worker["pid"]))
    )

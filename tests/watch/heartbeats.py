"""Heartbeats of workers that are not there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def heartbeat(folder: Path, plan_id: str, rank: int, start: str = "x", **changes: Any) -> None:
    """A worker that has been at work for a minute, in this process: 120 rows, 2 rows/s."""
    now = time.time()
    worker = {"plan_id": plan_id, "rank": rank, "state": "running", "host": "node-1", "pid": os.getpid()}
    worker |= {"started": now - 61, "updated": now, "heartbeat_seconds": 5.0, "seconds": 61.0, "loading_seconds": 1.0}
    worker |= {"num_answered": 120, "num_errors": 0, "rows_per_second": 2.0, "tokens_per_second": 20.0}
    worker |= {"waiting_for_input_seconds": 15.0, "writing_seconds": 3.0, "engine": {"decode_seconds": 30.0}}
    (folder / "stats").mkdir(exist_ok=True)
    (folder / f"stats/worker-{rank}-{start}.json").write_text(json.dumps(worker | changes))

"""Rows per second of `vlm-batch run` and of its peers over the same rows, in turns."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from bench_figure import Figure, Sizes, compared
from bench_trace import last_json, traced, vlm_batch
from bench_workload import MAX_NEW_TOKENS, MODEL, source, worker_stats, write_rows

PEERS = Path(__file__).with_name("bench_peers.py")
TRIAL_SECONDS = 90.0  # a peer's setting that takes longer over the trial rows, start-up included, is out
BATCHES, LOADERS, MORE_THREADS = (8, 32, 64), (0, 1), (2,)  # what the peers may choose from


class Setting(NamedTuple):
    """How a peer is run."""

    num_threads: int
    batch_rows: int
    num_loaders: int  # processes of the library's own data loader

    def __str__(self) -> str:
        return f"batch {self.batch_rows}, {self.num_threads} thread(s), {self.num_loaders} loader process(es)"


@dataclass(frozen=True, slots=True)
class Side:
    """One run of one side. `wall_seconds` starts with the process, `work_seconds` when its model is loaded."""

    num_rows: int
    wall_seconds: float
    work_seconds: float
    cpu_seconds: float
    load_average: float
    answers: dict[str, str]


def speed(sizes: Sizes, folder: Path) -> list[Figure]:
    """rows/s of all sides over the same rows, in turns."""
    rows = folder / "rows.parquet"
    write_rows(rows, sizes.speed_rows, num_images=1)
    loop_setting = best_setting("loop", rows, sizes, folder)
    batch_setting = best_setting("pipeline", rows, sizes, folder)
    sides: dict[str, Callable[[], Side]] = {
        "ours": lambda: ours(rows, folder),
        "again": lambda: ours(rows, folder),
        "pipeline": lambda: peer("pipeline", rows, sizes.speed_rows, batch_setting, folder),
        "loop": lambda: peer("loop", rows, sizes.loop_rows, loop_setting, folder),
    }
    runs: dict[str, list[Side]] = {name: [] for name in sides}
    for number in range(sizes.rounds):
        for name in reversed(sides) if number % 2 else sides:
            runs[name].append(sides[name]())
    notes = {
        "ours": "`vlm-batch run`, default engine settings",
        "again": "the same once more: how much is noise",
        "pipeline": f"transformers.pipeline, its best of {batch_setting}",
        "loop": f"the guide's loop, its best of {loop_setting}, first {sizes.loop_rows} rows",
    }
    figures = []
    for name, found in runs.items():
        work = [side.num_rows / side.work_seconds for side in found]
        figures.append(Figure(f"{name}: model loaded to Parquet written", "rows/s", work, note=notes[name]))
        whole = [sizes.speed_rows / whole_seconds(side, sizes.speed_rows) for side in found]
        scaled = "start-up + rows x seconds a row" if name == "loop" else ""
        figures.append(Figure(f"{name}: whole command, {sizes.speed_rows:,} rows", "rows/s", whole, note=scaled))
        if name != "loop":  # its few rows are less than its start-up
            cpu = [1000 * side.cpu_seconds / side.num_rows for side in found]
            figures.append(Figure(f"{name}: CPU time, start-up included", "s per 1,000 rows", cpu))
    for name, target in (("loop", ">= 4"), ("pipeline", "> 1")):
        pairs = list(zip(runs["ours"], runs[name], strict=True))
        work = [(a.num_rows / a.work_seconds) / (b.num_rows / b.work_seconds) for a, b in pairs]
        figures.append(compared(f"ours / {name}, without start-up", "x", work, target, sizes))
        whole = [whole_seconds(b, sizes.speed_rows) / whole_seconds(a, sizes.speed_rows) for a, b in pairs]
        figures.append(compared(f"ours / {name}, with start-up", "x", whole, target, sizes))
        same = [agreement(a.answers, b.answers) for a, b in pairs]
        figures.append(Figure(f"answers equal to those of {name}", "share", same))
    busy = [side.load_average for found in runs.values() for side in found]
    figures.append(Figure("load average meanwhile", "processes", busy, note=f"{os.cpu_count()} cores"))
    return figures


def whole_seconds(side: Side, num_rows: int) -> float:
    """Seconds from the start of the process for `num_rows` rows: measured, or scaled where a side ran fewer."""
    return side.wall_seconds + side.work_seconds * (num_rows / side.num_rows - 1)


def agreement(ours: dict[str, str], theirs: dict[str, str]) -> float:
    """Share of equal answers, over the rows that both have."""
    return statistics.mean(ours[name] == answer for name, answer in theirs.items())


def ours(rows: Path, folder: Path) -> Side:
    """One `vlm-batch run`."""
    output_dir = Path(tempfile.mkdtemp(dir=folder))
    trace = traced(vlm_batch("run", f"output_dir={output_dir}", *source(rows)), folder)
    stats = worker_stats(output_dir)
    table = pq.read_table(output_dir / "data", columns=["id", "response"])
    answers = dict(zip(table["id"].to_pylist(), table["response"].to_pylist(), strict=True))
    work_seconds = stats["seconds"] - stats["loading_seconds"]
    return Side(stats["num_answered"], trace.wall_seconds, work_seconds, trace.cpu_seconds, os.getloadavg()[0], answers)


def peer(name: str, rows: Path, num_rows: int, setting: Setting, folder: Path, timeout: float | None = None) -> Side:
    """One run of a peer."""
    output = folder / f"{name}.parquet"
    threads, batch_rows, loaders = map(str, setting)
    trace = traced(
        [
            *(sys.executable, str(PEERS), name, "--model", str(MODEL), "--rows", str(rows), "--output", str(output)),
            *("--num-rows", str(num_rows), "--max-new-tokens", str(MAX_NEW_TOKENS), "--num-threads", threads),
            *("--batch-rows", batch_rows, "--num-workers", loaders),
        ],
        folder,
        timeout=timeout,
    )
    work_seconds = last_json(trace)["work_seconds"]
    table = pq.read_table(output)
    answers = dict(zip(table["id"].to_pylist(), table["response"].to_pylist(), strict=True))
    return Side(num_rows, trace.wall_seconds, work_seconds, trace.cpu_seconds, os.getloadavg()[0], answers)


def best_setting(name: str, rows: Path, sizes: Sizes, folder: Path) -> Setting:
    """The setting with which a peer is fastest over some rows: batch and loaders with one thread, then more threads."""
    choices = [(1, 0)] if name == "loop" else [(batch, loaders) for batch in BATCHES for loaders in LOADERS]
    num_rows = min(sizes.trial_rows, sizes.speed_rows) // (4 if name == "loop" else 1)
    seconds: dict[Setting, float] = {}

    def attempt(setting: Setting) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            seconds[setting] = peer(name, rows, num_rows, setting, folder, TRIAL_SECONDS).work_seconds

    for batch_rows, num_loaders in choices if sizes.judged else choices[:1]:
        attempt(Setting(1, batch_rows, num_loaders))
    best = min(seconds, key=lambda setting: seconds[setting])
    for num_threads in MORE_THREADS if sizes.judged else ():
        attempt(best._replace(num_threads=num_threads))
    return min(seconds, key=lambda setting: seconds[setting])

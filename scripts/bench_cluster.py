"""Measure several workers on one machine: python scripts/bench_cluster.py --output outputs/bench

    processes  rows/s of one process on one core against two processes with a core each, decode workers included
    straggler  8 workers, one of them ten times slower: the end over what dividing the rows by speed would take
    status     seconds of `vlm-batch status` over a run of 200 workers

`processes` is the packaged model over its own rows. The workers of `straggler` sleep in the place of a model
(tests/torture/fake_model.py), so that a few cores are enough for all: each answers 3 rows in 60 ms, the slow one in
600 ms. It is measured from the moment when each has its first batch to the last publication, and once more with 8
workers alike, which shows what of it is the machine's. Sides take turns.

Prints one table and writes it as DIR/bench_cluster.md and, with every sample, as DIR/bench_cluster.json; exit code 1
where a target is missed. `--quick` takes few rows and judges no speed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bench_figure import QUICK, Figure, Sizes, circumstances, compared, table
from bench_trace import ROOT, traced, vlm_batch
from bench_workload import source, write_rows

PINNED = Path(__file__).with_name("bench_pinned.py")
FAKE_MODEL = [sys.executable, "-c", "import fake_model; fake_model.start()"]
NUM_WORKERS, SLOWER = 8, 10.0
BATCH_ROWS, BATCH_SECONDS = 3, 0.06
STRAGGLER_SECONDS = 30.0  # as long as it would take at best
STRAGGLER_SHARD_ROWS = 100  # 2 s of a worker, 20 s of the slow one
NUM_REPORTING = 200
PATIENCE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Side:
    """One run of `processes`. Its rate is the sum of the workers', each from when it had loaded to the end of all."""

    rows_per_second: float
    wall_rows_per_second: float  # of the whole command
    waiting: float  # share of the workers' time that they waited for input
    cpu_seconds: float  # for 1,000 rows, once all are loaded
    load_average: float


def processes(sizes: Sizes, folder: Path) -> list[Figure]:
    """One worker on a core against two on two."""
    if (num_cores := len(os.sched_getaffinity(0))) < 2:
        return [Figure("two processes / one", "x", [], ">= 1.7", note=f"skipped: {num_cores} core")]
    rows = folder / "rows.parquet"
    write_rows(rows, sizes.speed_rows, num_images=1)
    words = {"one": ["cluster=local"], "two": ["cluster=gpus", "cluster.workers=2"]}
    sides: dict[str, list[Side]] = {name: [] for name in words}
    for number in range(sizes.rounds):
        for name in reversed(words) if number % 2 else words:
            sides[name].append(pinned(rows, sizes.speed_rows, folder, words[name]))
    figures = []
    for name, found in sides.items():
        side = f"{name} process{'es' * (name == 'two')}"
        note = f"{sizes.speed_rows:,} rows"
        figures += [
            Figure(f"{side}: without start-up", "rows/s", [run.rows_per_second for run in found], note=note),
            Figure(f"{side}: whole command", "rows/s", [run.wall_rows_per_second for run in found], note=note),
            Figure(f"{side}: CPU time, without start-up", "s per 1,000 rows", [run.cpu_seconds for run in found]),
            Figure(f"{side}: waiting for input", "share", [run.waiting for run in found]),
            Figure(f"{side}: load average after it", "processes", [run.load_average for run in found]),
        ]
    pairs = list(zip(sides["one"], sides["two"], strict=True))
    work = [two.rows_per_second / one.rows_per_second for one, two in pairs]
    used = [2 * one.cpu_seconds / two.cpu_seconds for one, two in pairs]
    whole = [two.wall_rows_per_second / one.wall_rows_per_second for one, two in pairs]
    return [
        *figures,
        compared("two processes / one, without start-up", "x", work, ">= 1.7", sizes),
        Figure("two processes / one, with start-up", "x", whole),
        Figure("two processes / one, by CPU time of a row", "x", used, note="were no core shared with anything else"),
    ]


def pinned(rows: Path, num_rows: int, folder: Path, words: Sequence[str]) -> Side:
    """One run, each worker on a core of its own."""
    output_dir = Path(tempfile.mkdtemp(dir=folder))
    settings = [f"output_dir={output_dir}", *source(rows), "engine.num_workers=1", "write.shard_rows=100", *words]
    trace = traced([sys.executable, str(PINNED), *settings], folder)
    workers = [json.loads(path.read_text()) for path in (output_dir / "stats").glob("worker-*.json")]
    if (answered := sum(worker["num_answered"] for worker in workers)) < num_rows:
        raise RuntimeError(f"{answered} rows answered by {len(workers)} workers, expected {num_rows}")
    loaded = max(worker["started"] + worker["loading_seconds"] for worker in workers)
    rows_left = num_rows - sum(
        worker["rows_per_second"] * (loaded - worker["started"] - worker["loading_seconds"]) for worker in workers
    )
    at_work = sum(worker["seconds"] - worker["loading_seconds"] for worker in workers)
    return Side(
        rows_per_second=sum(worker["rows_per_second"] for worker in workers),
        wall_rows_per_second=num_rows / trace.wall_seconds,
        waiting=sum(worker["waiting_for_input_seconds"] for worker in workers) / at_work,
        cpu_seconds=1000 * trace.cpu_seconds_after(loaded) / max(1.0, rows_left),
        load_average=os.getloadavg()[0],
    )


def straggler(sizes: Sizes, folder: Path) -> list[Figure]:
    """How long the slowest of 8 workers holds up the end."""
    paces = {
        "8 workers alike": [BATCH_SECONDS] * NUM_WORKERS,
        "one of 8 ten times slower": [BATCH_SECONDS] * (NUM_WORKERS - 1) + [BATCH_SECONDS * SLOWER],
    }
    seconds = STRAGGLER_SECONDS if sizes.judged else 8.0  # each worker reads some hundred rows ahead
    found: dict[str, list[float]] = {name: [] for name in paces}
    for _ in range(sizes.rounds):
        for name, batch_seconds in paces.items():
            found[name].append(end_over_ideal(batch_seconds, seconds, Path(tempfile.mkdtemp(dir=folder))))
    alike, slow = found
    note = f"{seconds:g} s at best, shards of {STRAGGLER_SHARD_ROWS} rows"
    return [
        Figure(f"{alike}: end / ideal", "x", found[alike], note=note),
        compared(f"{slow}: end / ideal", "x", found[slow], "<= 1.3", sizes, note),
    ]


def end_over_ideal(batch_seconds: Sequence[float], seconds: float, folder: Path) -> float:
    """A run of as many workers as there are paces, over rows enough for so many seconds; to its last publication."""
    rate = sum(BATCH_ROWS / each for each in batch_seconds)
    rows, output_dir, gates = folder / "rows.parquet", folder / "run", folder / "gates"
    num_rows = int(seconds * rate)
    gates.mkdir()
    pq.write_table(pa.table({"number": list(range(num_rows))}), rows)
    words = [
        *("run", "dataset=parquet", f"dataset.path={rows}", "dataset.image_column=null", "prompt.user={{number}}"),
        *("vlm=demo", "engine.num_workers=1", "engine.parity_rows=0", "write.sync_seconds=1"),
        *(f"write.shard_rows={STRAGGLER_SHARD_ROWS}", f"output_dir={output_dir}"),
    ]
    with open(folder / "said", "w+") as said:
        workers = [
            subprocess.Popen(
                [*FAKE_MODEL, *words],
                env=os.environ
                | {"PYTHONPATH": f"{ROOT / 'tests' / 'torture'}{os.pathsep}{ROOT}"}
                | {"RANK": str(rank), "WORLD_SIZE": str(len(batch_seconds))}
                | {"FAKE_MODEL_GATES": str(gates), "FAKE_MODEL_GATED": "answers"}
                | {"FAKE_MODEL_BATCH_ROWS": str(BATCH_ROWS), "FAKE_MODEL_BATCH_SECONDS": str(each)},
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            for rank, each in enumerate(batch_seconds)
        ]
        try:
            wait(lambda: len(list(gates.glob("answers.*"))) == len(workers), workers, said.name)
            began = time.time()
            (gates / "answers").touch()
            wait(lambda: all(worker.poll() == 0 for worker in workers), workers, said.name)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    shards = list((output_dir / "data").glob("part-*.parquet"))
    if (found := sum(pq.read_metadata(path).num_rows for path in shards)) != num_rows:
        raise RuntimeError(f"{found} rows are published, expected {num_rows}")
    return (max(path.stat().st_ctime for path in shards) - began) / (num_rows / rate)


def wait(condition: Callable[[], bool], workers: Sequence[subprocess.Popen[bytes]], said: str) -> None:
    """Until the condition holds.

    Raises:
        RuntimeError: a worker failed, or it took too long.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if any(worker.poll() for worker in workers) or time.monotonic() > deadline:
            raise RuntimeError(f"a worker failed or hangs: {Path(said).read_text()[-2000:]}")
        time.sleep(0.02)


def status(sizes: Sizes, folder: Path) -> list[Figure]:
    """The command over the heartbeats of one worker and of many, of a run that lacks a shard."""
    output_dir = folder / "run"
    rows = folder / "rows.parquet"
    write_rows(rows, 8)
    words = [f"output_dir={output_dir}", *source(rows), "write.shard_rows=4", "generation.max_new_tokens=1"]
    traced(vlm_batch("run", *words), folder)
    (output_dir / "data" / "part-00001.parquet").unlink()
    [path] = (output_dir / "stats").glob("worker-*.json")
    alive = json.loads(path.read_text()) | {"state": "running", "host": "elsewhere", "updated": time.time() + 86_400}
    figures = []
    for number in (1, NUM_REPORTING):
        for rank in range(number):
            path.with_name(f"worker-{rank}-elsewhere.json").write_text(json.dumps(alive | {"rank": rank}))
        traces = [traced(vlm_batch("status", f"output_dir={output_dir}"), folder) for _ in range(sizes.repeats)]
        expected = f"running, {number} worker{'s' * (number > 1)}"
        if any(expected not in trace.output for trace in traces):
            raise RuntimeError(f"expected {expected!r} in: {traces[0].output}")
        figures.append(Figure(f"vlm-batch status, {expected}", "s", [trace.wall_seconds for trace in traces]))
    return figures


BENCHMARKS: dict[str, Callable[[Sizes, Path], list[Figure]]] = {
    "processes": processes,
    "straggler": straggler,
    "status": status,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for bench_cluster.json and bench_cluster.md")
    parser.add_argument("--only", choices=list(BENCHMARKS), action="append", help="only this one; may be given again")
    parser.add_argument("--rounds", type=int, help="of each side (default: 3)")
    parser.add_argument("--quick", action="store_true", help="few rows: shows that it runs, judges no speed")
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else Sizes(rounds=args.rounds or Sizes().rounds)
    around = circumstances()
    figures: list[Figure] = []
    for name in args.only or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as folder:
            try:
                figures += BENCHMARKS[name](sizes, Path(folder))
            except RuntimeError as problem:  # the others are worth having
                print(f"{name}: {problem}", file=sys.stderr)
                figures.append(Figure(f"{name} could not be measured", "", [], "measured", False))
        write(args.output, around, sizes, figures)
    print(table(figures))
    return 1 if any(figure.passed is False for figure in figures) else 0


def write(output: Path, around: dict[str, Any], sizes: Sizes, figures: Sequence[Figure]) -> None:
    """bench_cluster.json and bench_cluster.md with what is measured so far."""
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "circumstances": around | {"load_average_after": os.getloadavg()},
        "sizes": asdict(sizes),
        "figures": [asdict(figure) | {"median": figure.median} for figure in figures],
        "passed": all(figure.passed is not False for figure in figures),
    }
    (output / "bench_cluster.json").write_text(json.dumps(content, indent=1))
    (output / "bench_cluster.md").write_text(table(figures) + "\n")


if __name__ == "__main__":
    sys.exit(main())

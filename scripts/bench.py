"""Measure the promises about speed and size: python scripts/bench.py --output outputs/bench

    speed     rows/s of `vlm-batch run` against the loop of transformers' guide and against transformers.pipeline
    memory    resident memory over 50,000 rows: its slope in the main process and in each worker
    plan      seconds to plan 1,000,000 image files, and 1,000,000 Parquet rows
    finished  seconds until a finished run of 1,000 shards is recognised, its source gone
    startup   --help, status and audit: seconds, and that they load no torch

Everything runs in processes of its own, on the CPU, with the packaged model and its rows. The sides of `speed` take
turns, so that a busy machine slows them alike. Prints one table and writes it as DIR/bench.md and, with every sample,
as DIR/bench.json; exit code 1 where a target is missed. `--quick` takes few rows and judges no speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench_figure import QUICK, Figure, Sizes, circumstances, compared, table
from bench_speed import speed
from bench_trace import Trace, last_json, traced, vlm_batch, vlm_batch_modules
from bench_workload import DEMO, source, worker_stats, write_rows

FILES_A_FOLDER = 1_000
PLANNING = """
import json, sys, time
from pipeline.compose import compose
from pipeline.run import planned
from pipeline.vlm.identity import identify
config = compose(sys.argv[1:]).config
began = time.perf_counter()
plan = planned(config, identify(config.vlm), lambda template: None)
print(json.dumps({"seconds": time.perf_counter() - began, "num_rows": plan.num_rows, "torch": "torch" in sys.modules}))
"""


def memory(sizes: Sizes, folder: Path) -> list[Figure]:
    """Growth of resident memory with the rows done, each process for itself, after a tenth of the rows."""
    rows, output_dir = folder / "rows.parquet", folder / "run"
    write_rows(rows, sizes.memory_rows)
    progress: dict[float, int] = {}  # clock time -> rows done, from the run's heartbeat

    def look() -> None:
        with contextlib.suppress(FileNotFoundError):  # no heartbeat yet
            stats = worker_stats(output_dir)
            progress[stats["updated"]] = stats["num_answered"]

    command = vlm_batch("run", f"output_dir={output_dir}", *source(rows), "generation.max_new_tokens=4")
    trace = traced(command, folder, every=0.5, look=look)
    look()
    figures = []
    moments = sorted(progress)
    for name, samples in trace.resident.items():
        role = name.split()[0]
        if role == "helper":
            continue
        done = np.interp([moment for moment, _ in samples], moments, [progress[moment] for moment in moments])
        kept = done >= sizes.memory_rows // 10
        mib = np.array([size for _, size in samples]) / 2**20
        if sizes.judged and kept.sum() >= 10:
            slope = float(np.polyfit(done[kept] / 1000, mib[kept], 1)[0])
            note = f"{kept.sum()} looks, {mib[kept].min():.0f} to {mib[kept].max():.0f} MiB"
            figures.append(compared(f"{role}: growth", "MiB per 1,000 rows", [slope], "< 1", sizes, note))
        figures.append(Figure(f"{role}: peak", "MiB", [float(mib.max())], note=f"{sizes.memory_rows:,} rows"))
    return figures


def plan(sizes: Sizes, folder: Path) -> list[Figure]:
    """Planning alone, no model loaded: image files in folders of 1,000, and rows of Parquet files with an id column."""
    if (free := os.statvfs(folder).f_favail) < 2 * sizes.plan_rows:
        note = f"skipped: {free:,} inodes free in {folder}"
        return [Figure("plan: image files", "s", [], "< 30", None, note)]
    images, parquet = folder / "images", folder / "parquet"
    write_empty_files(images, sizes.plan_rows)
    parquet.mkdir()
    num_files = 10
    for number in range(num_files):
        write_ids(parquet / f"{number}.parquet", number, sizes.plan_rows // num_files)
    sources = {
        "image files": ["dataset=images", f"dataset.path={images}", "prompt=caption_short"],
        "Parquet rows": [*source(parquet)],
        "Parquet rows, no id column": [*source(parquet), "dataset.id_column=null", "dataset.columns=[question]"],
    }
    figures = []
    for name, settings in sources.items():
        seconds = []
        for _ in range(sizes.repeats):
            output_dir = tempfile.mkdtemp(dir=folder)
            trace = traced([sys.executable, "-c", PLANNING, f"output_dir={output_dir}", *settings], folder)
            found = last_json(trace)
            if found["num_rows"] != sizes.plan_rows or found["torch"]:
                raise RuntimeError(f"planning {name}: expected {sizes.plan_rows} rows and no torch, got {found}")
            seconds.append(found["seconds"])
        peak = max(size for _, size in trace.resident["main"]) / 2**20
        note = f"{sizes.plan_rows:,} of them; peak {peak:,.0f} MiB"
        figures.append(compared(f"plan: {name}", "s", seconds, "< 30", sizes, note))
    return figures


def write_empty_files(folder: Path, num_files: int) -> None:
    """Image files without content, 1,000 a folder: planning reads names and sizes only."""
    for start in range(0, num_files, FILES_A_FOLDER):
        inner = folder / f"{start // FILES_A_FOLDER:04d}"
        inner.mkdir(parents=True)
        for number in range(start, min(start + FILES_A_FOLDER, num_files)):
            os.close(os.open(inner / f"{number:07d}.jpg", os.O_CREAT | os.O_WRONLY))


def write_ids(path: Path, number: int, num_rows: int) -> None:
    """A Parquet file with fresh ids, one picture all over, and a question."""
    one = pq.read_table(DEMO).slice(0, 1)
    pictures = pa.concat_tables([one] * 1000)
    with pq.ParquetWriter(path, one.schema, compression="zstd") as writer:
        for start in range(0, num_rows, 1000):
            part = pictures.slice(0, num_rows - start)
            names = pa.array([f"{number}-{start + place:07d}" for place in range(len(part))])
            writer.write_table(part.set_column(0, one.schema.field("id"), names))


def finished(sizes: Sizes, folder: Path) -> list[Figure]:
    """A whole command over a finished run; its source is moved away first, so that nothing can list or read it."""
    rows, output_dir = folder / "rows.parquet", folder / "run"
    write_rows(rows, sizes.shards)
    words = ["run", f"output_dir={output_dir}", *source(rows), "write.shard_rows=1", "generation.max_new_tokens=1"]
    traced(vlm_batch(*words), folder)
    rows.rename(folder / "elsewhere.parquet")
    traces = [traced(vlm_batch_modules(*words), folder) for _ in range(sizes.repeats)]
    return _unloaded("finished run recognised", traces, "< 2", sizes, f"{sizes.shards:,} shards, source moved away; ")


def startup(sizes: Sizes, folder: Path) -> list[Figure]:
    """Commands that use no model."""
    rows, output_dir = folder / "rows.parquet", folder / "run"
    write_rows(rows, 8)
    traced(vlm_batch("run", f"output_dir={output_dir}", *source(rows), "generation.max_new_tokens=1"), folder)
    figures = []
    for words in (
        ["--help"],
        ["run", "--help"],
        ["status", f"output_dir={output_dir}"],
        ["audit", f"output_dir={output_dir}"],
    ):
        name = " ".join(word for word in words if "=" not in word)
        traces = [traced(vlm_batch_modules(*words), folder) for _ in range(sizes.repeats)]
        figures += _unloaded(f"vlm-batch {name}", traces, "< 1", sizes)
    return figures


def _unloaded(name: str, traces: Sequence[Trace], target: str, sizes: Sizes, note: str = "") -> list[Figure]:
    """The time of a command that must not load what only a model needs."""
    heavy = {module for trace in traces for module in last_json(trace)}
    note += f"{statistics.median(trace.main_cpu_seconds for trace in traces):.2f} s of CPU time"
    return [
        compared(name, "s", [trace.wall_seconds for trace in traces], target, sizes, note),
        Figure(f"{name}: heavy modules", "modules", [len(heavy)], "= 0", not heavy, ", ".join(sorted(heavy))),
    ]


BENCHMARKS: dict[str, Callable[[Sizes, Path], list[Figure]]] = {
    "speed": speed,
    "memory": memory,
    "plan": plan,
    "finished": finished,
    "startup": startup,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for bench.json and bench.md")
    parser.add_argument("--only", choices=list(BENCHMARKS), action="append", help="only this one; may be given again")
    parser.add_argument("--quick", action="store_true", help="few rows: shows that it runs, judges no speed")
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else Sizes()
    around = circumstances()
    args.output.mkdir(parents=True, exist_ok=True)
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
    """bench.json and bench.md with what is measured so far."""
    content = {
        "circumstances": around | {"load_average_after": os.getloadavg()},
        "sizes": asdict(sizes),
        "settings": source(Path("ROWS")),
        "figures": [asdict(figure) | {"median": figure.median} for figure in figures],
        "passed": all(figure.passed is not False for figure in figures),
    }
    (output / "bench.json").write_text(json.dumps(content, indent=1))
    (output / "bench.md").write_text(table(figures) + "\n")


if __name__ == "__main__":
    sys.exit(main())

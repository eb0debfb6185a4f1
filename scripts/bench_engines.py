"""Engines side by side: python scripts/bench_engines.py --output outputs/bench

Every side answers the same requests, from JPEG bytes to a closed Parquet file, in a process of its own; sides take
turns, forwards and backwards, and one is there twice to show the noise. Nothing is downloaded: pictures, weights and
lengths of answers are made here (bench_requests.py, bench_lengths.py, bench_model.py).

    captions    answers of 36 tokens on average, 120 at most
    long        100 on average, 256 at most
    short       16 on average, 64 at most
    questions   eight questions about each picture, answers of 16 tokens on average

Prints a table for each workload and writes it as DIR/engines.md and, with every run, as DIR/engines.json. A side that
cannot run here has a line that says why. Exit code 1 where a target is missed. `--quick` takes a tiny model and few
requests, shows that everything runs and judges no speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bench_ceiling import Bound, Ceiling, Shape, bound
from bench_figure import QUICK as QUICK_SIZES
from bench_figure import Sizes, circumstances
from bench_figure import table as figure_table
from bench_lengths import QUICK, WORKLOADS, Workload
from bench_model import SHAPES
from bench_requests import write_by_picture, write_requests
from bench_sides import SCRIPTS, Absent, Measured, Ours, Peer, Setup, Side, Vllm
from bench_table import Line, judged, phase_table, table
from bench_trace import ROOT, last_json, traced

SLOTS = 16  # of every side but those that say otherwise: the same memory for keys and values
_SIXTEEN = f"engine.max_batch_rows={SLOTS}"
_TEMPLATE_WORDS = 5  # of the chat template around a question: <s> USER : ... ASSISTANT :
_FLOAT32_ROWS, _FLOAT32_TOKENS = 24, 16


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the table. Slow sides answer a `share` of the workload's rows, or take part in every second round."""

    side: Side
    num_slots: int | None
    group: str = "core"
    share: float = 1.0
    seldom: bool = False
    workloads: Sequence[str] = tuple(WORKLOADS)


def slots(*words: str, by_picture: bool = False) -> Ours:
    """engine=slots with as many slots as the other sides have rows in a batch."""
    return Ours(("engine=slots", _SIXTEEN, *words), by_picture)


# One line adds or removes a side.
SIDES: dict[str, Entry] = {
    "loop, batch 1": Entry(Peer("loop"), 1, share=1 / 8, seldom=True),
    "padded generate, batch 16": Entry(Peer("padded", 16), 16, share=1 / 2),
    "padded generate, batch 64": Entry(Peer("padded", 64), 64, share=1 / 2, seldom=True),
    "transformers.pipeline, batch 16": Entry(Peer("pipeline", 16), 16, share=1 / 2, seldom=True),
    "static cache + compile, batch 16": Entry(Peer("compiled", 16), 16, "compiled", share=1 / 2),
    "vLLM, 16 at once": Entry(Vllm(16), None),
    "vLLM, its default": Entry(Vllm(), None, "more"),
    "ours: vllm, 16": Entry(Ours(("engine=vllm", _SIXTEEN), in_vllm=True), None, "more"),
    "ours: static, 16": Entry(Ours(("engine=static", _SIXTEEN)), 16),
    "ours: slots, 16": Entry(slots(), 16),
    "ours: slots, 16, again": Entry(slots(), 16),
    "ours: slots, its default": Entry(Ours(("engine=slots",)), None),
    "ours: slots, 16, a row per picture": Entry(slots(by_picture=True), 16, workloads=("questions",)),
    "ours: slots, 16, each question alone": Entry(
        slots("engine.reuse_images=false", "engine.reuse_prefixes=false"), 16, workloads=("questions",)
    ),
    "ours: slots, its default, each question alone": Entry(
        Ours(("engine=slots", "engine.reuse_images=false", "engine.reuse_prefixes=false")),
        None,
        workloads=("questions",),
    ),
    "slots without fused_projections": Entry(slots("engine.fused_projections=false"), 16, "features"),
    "slots without packed_weights": Entry(slots("engine.packed_weights=false"), 16, "features"),
    "slots with sdpa in decode": Entry(slots("engine.decode_attention=sdpa"), 16, "features"),
    "slots without reuse_images": Entry(
        slots("engine.reuse_images=false"), 16, "features", workloads=("questions", "captions")
    ),
    "slots without reuse_prefixes": Entry(
        slots("engine.reuse_prefixes=false"), 16, "features", workloads=("questions", "captions")
    ),
}
GROUPS = tuple(dict.fromkeys(entry.group for entry in SIDES.values()))
NOISE = "ours: slots, 16, again"


@dataclass(slots=True)
class Found:
    """What is known of a side on a workload."""

    entry: Entry
    runs: list[Measured] = dataclasses.field(default_factory=list)
    absent: str | None = None
    logits: dict[str, Any] = dataclasses.field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for engines.json and engines.md")
    parser.add_argument("--workload", choices=list(WORKLOADS), action="append", help="may be given again")
    parser.add_argument("--group", choices=GROUPS, action="append", help="sides: core, and what is given here")
    parser.add_argument("--side", action="append", help="only sides with this in their name; may be given again")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num-requests", type=int, help="instead of the workload's own number")
    parser.add_argument("--vllm-python", type=Path, help="of an environment with vLLM; .venv-vllm/bin/python if there")
    parser.add_argument("--no-float32", action="store_true", help="leave out the comparison of logits and answers")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one run of one side may take")
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs, judges no speed")
    args = parser.parse_args(argv)
    found_python = ROOT / ".venv-vllm" / "bin" / "python"
    args.vllm_python = args.vllm_python or (found_python if found_python.exists() else None)
    args.output.mkdir(parents=True, exist_ok=True)
    around = circumstances()
    report: dict[str, Any] = {"circumstances": around, "model": SHAPES["tiny" if args.quick else "mid"]}
    pages, passed = [], True
    with tempfile.TemporaryDirectory(prefix="bench-engines-") as folder:
        names = ("model", "vllm_model")
        model, vllm_model = (Path(folder) / name for name in names)
        shape_name = "tiny" if args.quick else "mid"
        words = ["--shape", shape_name, "--output", str(model), "--renamed", str(vllm_model)]
        traced([sys.executable, str(SCRIPTS / "bench_model.py"), *words], Path(folder))
        for name in args.workload or ["captions"]:
            load = (QUICK if args.quick else WORKLOADS)[name]
            load = replace(load, num_requests=args.num_requests or load.num_requests)
            content, figures = benchmark(name, load, args, Path(folder), report)
            pages.append(content)
            passed = passed and all(figure.passed is not False for figure in figures)
            (args.output / "engines.md").write_text("\n".join(pages))
            (args.output / "engines.json").write_text(json.dumps(report, indent=1))
    print("\n".join(pages))
    return 0 if passed else 1


def benchmark(
    name: str, load: Workload, args: argparse.Namespace, folder: Path, report: dict[str, Any]
) -> tuple[str, list[Any]]:
    """One workload: its page, and the figures that are held against targets. `report` gets all that was measured."""
    setup = prepared(name, load, args, folder)
    machine = last_json(
        traced(
            [
                *(sys.executable, str(SCRIPTS / "bench_ceiling.py"), "--model", str(setup.model)),
                *("--num-threads", str(setup.num_threads), "--seconds", "0.1" if args.quick else "2"),
            ],
            folder,
        )
    )
    ceiling, shape = Ceiling(**machine["ceiling"]), Shape(**machine["shape"])
    requests = pq.read_table(setup.rows, columns=["id", "question", "max_new_tokens"]).to_pylist()
    found = {key: Found(entry) for key, entry in chosen(name, args).items()}
    for number in range(args.rounds):
        for key in list(reversed(found) if number % 2 else found):
            if found[key].entry.seldom and number % 2:
                continue
            measure(key, found[key], setup, [request["max_new_tokens"] for request in requests])
    if not args.no_float32:
        in_float32(found, setup, folder)
    lines = [
        Line(
            name=key,
            runs=each.runs,
            absent=each.absent,
            logits=each.logits,
            num_slots=each.entry.num_slots,
            num_requests=len(requests),
            bound=bound_of(requests, each.runs, shape, ceiling, load) if each.runs else None,
        )
        for key, each in found.items()
    ]
    sizes = QUICK_SIZES if args.quick or args.num_requests else Sizes()
    figures = judged(lines, name, sizes)
    report.setdefault("workloads", {})[name] = {
        "workload": asdict(load),
        "ceiling": machine["ceiling"],
        "shape": machine["shape"],
        "sides": {line.name: line.record() for line in lines},
        "figures": [asdict(figure) for figure in figures],
    }
    whole = bound_of(requests, [], shape, ceiling, load)
    return page(name, load, requests, ceiling, whole, lines, figures), figures


def chosen(workload: str, args: argparse.Namespace) -> dict[str, Entry]:
    """The sides of a workload that were asked for."""
    groups = {"core", *(args.group or ())}
    found = {
        key: entry
        for key, entry in SIDES.items()
        if workload in entry.workloads
        and (any(part in key for part in args.side) if args.side else entry.group in groups)
    }
    if not found:
        raise SystemExit(
            f"no side of the workload {workload} has {args.side} in its name; there are: {', '.join(SIDES)}"
        )
    return found


def prepared(name: str, load: Workload, args: argparse.Namespace, folder: Path) -> Setup:
    """The workload's files."""
    shape = SHAPES["tiny" if args.quick else "mid"]
    rows = folder / f"{name}.parquet"
    write_requests(rows, load, shape["text"]["vocab_size"])
    by_picture = folder / f"{name}-by-picture.parquet" if load.num_questions > 1 else None
    if by_picture is not None:
        write_by_picture(rows, by_picture, load.num_questions)
    return Setup(
        folder=folder,
        model=folder / "model",
        vllm_model=folder / "vllm_model",
        rows=rows,
        rows_by_picture=by_picture,
        num_questions=load.num_questions,
        num_requests=load.num_requests,
        max_new_tokens=load.cap_tokens,
        max_prompt_tokens=num_image_tokens(shape) + _TEMPLATE_WORDS + load.num_words[1],
        dtype="bfloat16",
        num_threads=len(os.sched_getaffinity(0)),
        vllm_python=args.vllm_python and args.vllm_python.absolute(),
        timeout_seconds=args.timeout,
    )


def num_image_tokens(shape: dict[str, Any]) -> int:
    return int((shape["image_size"] // 14) ** 2)


def measure(name: str, found: Found, setup: Setup, caps: Sequence[int]) -> None:
    """One run of one side. A side that could not run once is not asked again. caps: tokens of each answer."""
    if found.absent:
        return
    num_rows = max(1, round(len(caps) * found.entry.share))
    try:
        run = found.entry.side.run(setup, num_rows)
        expected = sum(caps[:num_rows])
        if (run.num_rows, run.num_generated_tokens) != (num_rows, expected):  # a side that does less is no side
            raise RuntimeError(
                f"{run.num_rows} rows and {run.num_generated_tokens} tokens, expected {num_rows} and {expected}"
            )
    except Absent as reason:
        found.absent = str(reason)
    except subprocess.TimeoutExpired:
        found.absent = f"took longer than {setup.timeout_seconds:.0f} s for {num_rows} rows"
    except RuntimeError as problem:  # the others are worth having
        found.absent = f"failed: {_reason(str(problem))}"
        print(problem, file=sys.stderr)
    else:
        found.runs.append(run)
    said = found.absent or f"{run.rows_per_second:.2f} rows/s, {run.tokens_per_second:.1f} tokens/s"
    print(f"{name}: {said}", file=sys.stderr, flush=True)


def _reason(said: str) -> str:
    """The line of a failed command's output that says most."""
    lines = said.strip().splitlines()
    telling = [line for line in lines if re.search(r"(Error|Exception|vlm-batch): ", line)]
    return (telling or lines)[-1].strip()[:300]


def in_float32(found: dict[str, Found], setup: Setup, folder: Path) -> None:
    """Logits and answers of every side against the loop's, over few rows with short answers."""
    rows = pq.read_table(setup.rows).slice(0, _FLOAT32_ROWS)
    caps = [min(_FLOAT32_TOKENS, cap) for cap in rows["max_new_tokens"].to_pylist()]
    place = rows.schema.get_field_index("max_new_tokens")
    type_ = rows.schema.field(place).type
    file = folder / "float32.parquet"
    pq.write_table(rows.set_column(place, "max_new_tokens", pa.array(caps, type_)), file)
    setup = replace(setup, rows=file, dtype="float32", max_new_tokens=max(caps))
    ours = {
        key: each.entry.side.words
        for key, each in found.items()
        if each.runs and isinstance(each.entry.side, Ours) and each.entry.side.traceable and key != NOISE
    }
    command = [
        *(sys.executable, str(SCRIPTS / "bench_logits.py"), "--num-rows", str(len(rows))),
        *("--max-new-tokens", str(_FLOAT32_TOKENS), "--num-threads", str(setup.num_threads)),
        *("--settings", *setup.settings, "--side", *(f"{key}={' '.join(words)}" for key, words in ours.items())),
    ]
    try:
        logits = last_json(traced(command, folder, timeout=setup.timeout_seconds))
        reference = Peer("loop").run(setup, len(rows)).answers
    except (RuntimeError, subprocess.TimeoutExpired) as problem:
        print(f"float32 could not be compared: {problem}", file=sys.stderr)
        return
    for key, each in found.items():
        if key in logits:
            each.logits = logits[key]
        elif isinstance(each.entry.side, Peer) and each.entry.side.name == "padded" and each.runs:
            each.logits = logits["padded"]
        elif each.runs and key != NOISE and each.entry.group != "compiled" and not isinstance(each.entry.side, Ours):
            answers = each.entry.side.run(setup, len(rows)).answers
            same = sum(answers[row].strip() == text.strip() for row, text in reference.items())
            each.logits = {"num_rows": len(reference), "num_identical": same}


def bound_of(
    requests: Sequence[dict[str, Any]], runs: Sequence[Measured], shape: Shape, ceiling: Ceiling, load: Workload
) -> Bound:
    """The bound of the requests that a side answered, at as many slots for every side."""
    done = requests[: runs[0].num_rows] if runs else requests
    return bound(
        shape,
        ceiling,
        "bfloat16",
        prompt_tokens=[shape.num_image_tokens + _TEMPLATE_WORDS + len(request["question"].split()) for request in done],
        answer_tokens=[request["max_new_tokens"] for request in done],
        num_slots=SLOTS,
        num_pictures=max(1, len(done) // load.num_questions),
    )


def page(
    name: str,
    load: Workload,
    requests: Sequence[dict[str, Any]],
    ceiling: Ceiling,
    whole: Bound,
    lines: Sequence[Line],
    figures: Sequence[Any],
) -> str:
    """A workload as Markdown."""
    lengths = [request["max_new_tokens"] for request in requests]
    busy = [run.load_average for line in lines for run in line.runs]
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in ceiling.flops_per_second.items())
    about = f"eight questions about each of {load.num_pictures} pictures, " if load.num_questions > 1 else ""
    return "\n".join(
        [
            f"### {name}",
            "",
            f"{len(requests)} requests, {about}answers of {statistics.mean(lengths):.0f} tokens on average, "
            f"{max(lengths)} at most. Load average meanwhile {min(busy, default=0):.1f} .. {max(busy, default=0):.1f}. "
            f"Ceilings in this run: copy {ceiling.bytes_per_second / 1e9:.1f} GB/s, {rates}. "
            f"The bound: vision {whole.vision_seconds:.1f} s + prompts {whole.prefill_seconds:.1f} s + decode "
            f"{whole.decode_seconds:.1f} s at {SLOTS} slots = {len(requests) / whole.seconds:.2f} rows/s.",
            "",
            table(lines),
            "",
            phase_table(lines),
            "",
            figure_table(figures) if figures else "",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

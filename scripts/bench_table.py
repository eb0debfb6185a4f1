"""The table of the engine benchmark: a line for each side, and what is held against a target."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench_ceiling import Bound
from bench_figure import Figure, Sizes, compared
from bench_sides import Measured

COLUMNS = (
    "side",
    "rows/s",
    "least .. most",
    "with start-up",
    "tokens/s",
    "decode steps",
    "x ideal",
    "prompt padding",
    "idle decode rows",
    "waiting",
    "CPU s/row",
    "peak MiB",
    "of the bound",
    "logit error",
    "identical",
)


@dataclass(frozen=True, slots=True)
class Line:
    """A side and all its runs; `absent` says why there is none."""

    name: str
    runs: Sequence[Measured]
    absent: str | None
    num_slots: int | None
    num_requests: int  # of the workload; a slow side answers some of them
    bound: Bound | None
    logits: dict[str, Any] = field(default_factory=dict)

    def median(self, value: Callable[[Measured], float | None]) -> float | None:
        """Over the runs; None where none knows it."""
        found = [each for run in self.runs if (each := value(run)) is not None]
        return statistics.median(found) if found else None

    @property
    def rows_per_second(self) -> list[float]:
        return [run.rows_per_second for run in self.runs]

    @property
    def num_steps(self) -> int | None:
        """Decode steps of the last run: they do not hang on the clock, but for when rows come in."""
        return self.runs[-1].engine.get("num_decode_steps") if self.runs else None

    @property
    def steps_over_ideal(self) -> float | None:
        """Over (tokens - rows) / slots: the first token of an answer comes from its prompt."""
        if not self.num_steps or not self.num_slots:
            return None
        run = self.runs[-1]
        num_slots = min(self.num_slots, run.num_rows)
        return self.num_steps * num_slots / (run.num_generated_tokens - run.num_rows)

    @property
    def prompt_padding(self) -> float | None:
        return self._wasted("num_prompt_tokens", "num_padded_prompt_tokens")

    @property
    def idle_rows(self) -> float | None:
        """Of the rows that decode steps computed, those that gave no token."""
        if not self.runs or not (computed := self.runs[-1].engine.get("num_decode_rows")):
            return None
        return 1 - (self.runs[-1].num_generated_tokens - self.runs[-1].num_rows) / float(computed)

    def _whole_rows_per_second(self, run: Measured) -> float:
        """Start-up included; as if a side that ran fewer rows had run them all."""
        start_seconds = run.wall_seconds - run.work_seconds
        return self.num_requests / (start_seconds + self.num_requests / run.rows_per_second)

    def _wasted(self, used: str, whole: str) -> float | None:
        engine = self.runs[-1].engine if self.runs else {}
        return 1 - engine[used] / engine[whole] if engine.get(whole) else None

    def cells(self) -> list[str]:
        if not self.runs:
            return [self.name, f"not measured: {self.absent or 'not asked for'}".replace("|", "\\|")]
        speeds = self.rows_per_second
        whole = self.median(self._whole_rows_per_second)
        waiting = self.median(
            lambda run: None if run.waiting_seconds is None else run.waiting_seconds / run.work_seconds
        )
        error, same = self.logits.get("logit_error"), self.logits.get("num_identical")
        share = self.median(lambda run: self.bound.seconds / run.work_seconds if self.bound else None)
        return [
            self.name,
            f"{statistics.median(speeds):.2f}",
            f"{min(speeds):.2f} .. {max(speeds):.2f}" if len(speeds) > 1 else "",
            _number(whole, ".2f"),
            _number(self.median(lambda run: run.tokens_per_second), ".1f"),
            _number(self.num_steps, ",d"),
            _number(self.steps_over_ideal, ".2f"),
            _number(self.prompt_padding, ".0%"),
            _number(self.idle_rows, ".0%"),
            _number(waiting, ".1%"),
            _number(self.median(lambda run: run.cpu_seconds and run.cpu_seconds / run.num_rows), ".2f"),
            _number(self.median(lambda run: run.peak_bytes / 2**20), ",.0f"),
            _number(share, ".0%"),
            _number(error, ".0e"),
            f"{same} of {self.logits['num_rows']}" if same is not None else "",
        ]

    def record(self) -> dict[str, Any]:
        """Everything, for JSON; the answers' texts left out."""
        runs = [asdict(run) | {"rows_per_second": run.rows_per_second} for run in self.runs]
        for run in runs:
            del run["answers"]
        return {
            "absent": self.absent,
            "num_slots": self.num_slots,
            "bound": asdict(self.bound) if self.bound else None,
            "float32": self.logits,
            "runs": runs,
        }


def table(lines: Sequence[Line]) -> str:
    """All sides as a Markdown table."""
    rows = [line.cells() for line in lines]
    rows = [cells + [""] * (len(COLUMNS) - len(cells)) for cells in rows]
    rule = ["---", *["---:"] * (len(COLUMNS) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, rule, *rows))


def phase_table(lines: Sequence[Line]) -> str:
    """Where the time of our own sides went, in percent of their work; nothing where no run says it."""
    names = list(dict.fromkeys(name for line in lines for run in line.runs for name in run.phases))
    if not names:
        return ""
    rows = []
    for line in lines:
        if any(run.phases for run in line.runs):
            shares = [
                line.median(lambda run, name=name: _share(run, name))  # type: ignore[misc]
                for name in names
            ]
            rows.append([line.name, *(_number(share, ".1%") for share in shares)])
    head = ["share of the work", *(name.replace("_", " ") for name in names)]
    rule = ["---", *["---:"] * len(names)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _share(run: Measured, name: str) -> float | None:
    return run.phases[name] / run.work_seconds if name in run.phases else None


def judged(lines: Sequence[Line], workload: str, sizes: Sizes) -> list[Figure]:
    """What is held against a target, of the sides that ran."""
    by_name = {line.name: line for line in lines if line.runs}
    slots, default = by_name.get("ours: slots, 16"), by_name.get("ours: slots, its default")
    figures: list[Figure] = []

    def ratio(name: str, value: Callable[[Measured], float], target: str, ours: Line | None = slots) -> None:
        other = by_name.get(name)
        if ours and other:
            pairs = zip(ours.runs, other.runs, strict=False)
            samples = [value(one) / value(two) for one, two in pairs]
            figure = Figure(f"{'slots, its default' if ours is default else 'slots'} / {name}", "x", samples)
            figures.append(compared(figure.name, "x", samples, target, sizes) if target else figure)

    ratio("ours: slots, 16, again", lambda run: run.rows_per_second, "")
    if workload == "captions":
        ratio("ours: static, 16", lambda run: run.rows_per_second, ">= 2")
        ratio("padded generate, batch 16", lambda run: run.rows_per_second, ">= 2")
        ratio("vLLM, 16 at once", lambda run: run.tokens_per_second, ">= 1")
    if workload == "questions":
        ratio("ours: slots, 16, each question alone", lambda run: run.rows_per_second, ">= 3")
        ratio("ours: slots, its default, each question alone", lambda run: run.rows_per_second, ">= 3", default)
    for line in by_name.values():
        if not line.name.startswith(("ours: slots", "ours: static")):
            continue
        if line is slots and workload == "captions" and line.steps_over_ideal:
            figures.append(compared("slots: decode steps", "x ideal", [line.steps_over_ideal], "< 1.1", sizes))
        if line is slots:
            waiting = [(run.waiting_seconds or 0.0) / run.work_seconds for run in line.runs]
            figures.append(compared("slots: waiting for input", "share", waiting, "< 0.05", sizes))
        if (error := line.logits.get("logit_error")) is not None:
            # No matter of speed: judged however few the rows.
            figures.append(compared(f"{line.name}: float32 logits", "of the largest", [error], "< 1e-5", Sizes()))
    return figures


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

"""What a benchmark reports: figures, held against targets, as one table; and the machine they are of."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "pillow", "numpy")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    speed_rows: int = 5_280
    loop_rows: int = 300
    trial_rows: int = 192
    rounds: int = 3
    memory_rows: int = 50_000
    plan_rows: int = 1_000_000
    shards: int = 1_000
    repeats: int = 3

    @property
    def judged(self) -> bool:
        """Whether it is enough to hold speed against a target."""
        return self.speed_rows >= 1_000


QUICK = Sizes(48, 8, 16, 1, 200, 2_000, 20, 1)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table; `passed` is None where there is no target or too little was measured to judge one."""

    name: str
    unit: str
    samples: Sequence[float]
    target: str = ""
    passed: bool | None = None
    note: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None


def compared(name: str, unit: str, samples: Sequence[float], target: str, sizes: Sizes, note: str = "") -> Figure:
    """A figure whose median is held against a target such as ">= 4" or "< 30"."""
    sign, _, bound = target.partition(" ")
    median = statistics.median(samples)
    held: dict[str, Callable[[float, float], bool]] = {"<": lt, "<=": le, ">": gt, ">=": ge}
    passed = held[sign](median, float(bound))
    return Figure(name, unit, samples, target, passed if sizes.judged else None, note)


def table(figures: Sequence[Figure]) -> str:
    """All figures as a Markdown table."""
    lines = ["| figure | median | least .. most | unit | target | reached | note |", "|---|---:|---:|---|---|---|---|"]
    for figure in figures:
        spread = f"{_text(min(figure.samples))} .. {_text(max(figure.samples))}" if len(figure.samples) > 1 else ""
        reached = {None: "not judged" if figure.target else "", True: "yes", False: "NO"}[figure.passed]
        cells = (figure.name, _text(figure.median), spread, figure.unit, figure.target, reached, figure.note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def circumstances() -> dict[str, Any]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "load_average_before": os.getloadavg(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"

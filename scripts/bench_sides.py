"""How one side of the engine benchmark is run, each as a process of its own, and what is read from it.

Ours(words)              `vlm-batch run` with these settings
Peer(name, batch_rows)   a way of transformers' own (bench_peers.py)
Vllm(max_num_seqs)       vLLM's offline engine (bench_vllm.py), in the environment that it is installed in
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
from bench_trace import last_json, traced, vlm_batch
from bench_workload import worker_stats

SCRIPTS = Path(__file__).resolve().parent


class Absent(Exception):
    """A side cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all sides of a workload share."""

    folder: Path  # where outputs go
    model: Path
    vllm_model: Path  # the same weights under the names that vLLM knows
    rows: Path
    rows_by_picture: Path | None  # a picture's questions in one row
    num_questions: int
    num_requests: int
    max_new_tokens: int
    max_prompt_tokens: int
    dtype: str
    num_threads: int
    vllm_python: Path | None
    timeout_seconds: float

    @property
    def settings(self) -> list[str]:
        """Of `vlm-batch run`."""
        return [
            *("dataset=parquet", f"dataset.path={self.rows}", "dataset.image_column=images", "dataset.id_column=id"),
            *("vlm=auto", f"vlm.path={self.model}", f"vlm.dtype={self.dtype}", "vlm.device=cpu"),
            *(f"generation.max_new_tokens={self.max_new_tokens}", "generation.max_new_tokens_column=max_new_tokens"),
            *("generation.ignore_eos=true", "engine.parity_rows=0"),
        ]


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one side.

    `work_seconds` begins when its model is loaded, and ends when its Parquet file is closed. What an engine does before
    its first row to know the model is start-up: vLLM's compilation, and the trials of ours.
    """

    num_rows: int
    num_generated_tokens: int
    wall_seconds: float  # of the process, start-up included
    work_seconds: float
    waiting_seconds: float | None  # of the work: without a batch to compute
    cpu_seconds: float | None  # of the work, all processes; None where a peer does not say when its work began
    peak_bytes: int
    load_average: float
    engine: Mapping[str, Any] = field(default_factory=dict)  # counts as in stats/*.json; a peer may know none
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds of the work, by name
    numerics: Mapping[str, Any] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def rows_per_second(self) -> float:
        return self.num_rows / self.work_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.num_generated_tokens / self.work_seconds


class Side(Protocol):
    """Something that answers the rows of a workload."""

    def run(self, setup: Setup, num_rows: int) -> Measured:
        """Answer the first so many rows.

        Raises:
            Absent: it cannot run here.
            RuntimeError: it failed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ours:
    """`vlm-batch run`. by_picture: a row for each picture, its questions as prompt.variants."""

    words: Sequence[str]
    by_picture: bool = False
    in_vllm: bool = False  # in the environment that vLLM is installed in

    @property
    def traceable(self) -> bool:
        """Whether its logits can be compared over the workload's own rows, in this environment."""
        return not self.by_picture and not self.in_vllm

    def run(self, setup: Setup, num_rows: int) -> Measured:
        output_dir = Path(tempfile.mkdtemp(dir=setup.folder))
        words = [*setup.settings, f"dataset.max_rows={num_rows}", *self.words, f"output_dir={output_dir}"]
        if self.by_picture:
            words = [word for word in words if not word.startswith("dataset.max_rows=")]
            words += [f"dataset.path={setup.rows_by_picture}", f"dataset.max_rows={num_rows // setup.num_questions}"]
            words += [f"prompt.variants.{number}={{{{question_{number}}}}}" for number in range(setup.num_questions)]
        command = vlm_batch("run", *words)
        if self.in_vllm:
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))  # as its own side has them (bench_vllm.py)
            command = ["env", f"VLLM_CPU_OMP_THREADS_BIND={cores}", str(vllm_python(setup)), *command[1:]]
            command += [f"vlm.path={setup.vllm_model}"]
        try:
            trace = traced(command, setup.folder, timeout=setup.timeout_seconds)
        except RuntimeError as problem:
            if "ended with exit code 2:" in str(problem):  # a choice or key that this version does not have
                raise Absent(str(problem).strip().splitlines()[-1]) from problem
            raise
        stats = worker_stats(output_dir)
        table = pq.read_table(output_dir / "data", columns=["id", "prompt_name", "response"]).to_pylist()
        shutil.rmtree(output_dir)
        return Measured(
            num_rows=stats["num_answered"],
            num_generated_tokens=stats["num_generated_tokens"],
            wall_seconds=trace.wall_seconds,
            work_seconds=stats["seconds"] - stats["loading_seconds"] - stats["engine"].get("trial_seconds", 0.0),
            waiting_seconds=stats["waiting_for_input_seconds"],
            cpu_seconds=trace.cpu_seconds_after(stats["started"] + stats["loading_seconds"]),
            peak_bytes=trace.peak_bytes,
            load_average=os.getloadavg()[0],
            engine=stats["engine"],
            phases=phases(stats),
            numerics=stats["numerics"],
            answers={self._request(row): row["response"] or "" for row in table},
        )

    def _request(self, row: Mapping[str, Any]) -> str:
        """The request's id: a picture's row is called after its first question."""
        return f"{row['id'].rpartition('-')[0]}-{row['prompt_name']}" if self.by_picture else row["id"]


def phases(stats: Mapping[str, Any]) -> dict[str, float]:
    """Every share of the work that a run reports: names in _seconds, of the run and of what lies one level below."""
    whole = ("loading_seconds", "seconds", "trial_seconds", "heartbeat_seconds")
    levels = [stats, *(value for name, value in stats.items() if isinstance(value, Mapping) and name != "series")]
    found = {
        name: value
        for level in levels
        for name, value in level.items()
        if name.endswith("_seconds") and name not in whole
    }
    return {name.removesuffix("_seconds"): float(value) for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Peer:
    """transformers alone."""

    name: str
    batch_rows: int = 1

    def run(self, setup: Setup, num_rows: int) -> Measured:
        output = setup.folder / f"{self.name}.parquet"
        command = [
            *(sys.executable, str(SCRIPTS / "bench_peers.py"), self.name, "--model", str(setup.model)),
            *("--rows", str(setup.rows), "--output", str(output), "--num-rows", str(num_rows)),
            *("--max-new-tokens", str(setup.max_new_tokens), "--max-prompt-tokens", str(setup.max_prompt_tokens)),
            *("--dtype", setup.dtype, "--num-threads", str(setup.num_threads), "--batch-rows", str(self.batch_rows)),
        ]
        trace = traced(command, setup.folder, timeout=setup.timeout_seconds)
        return _reported(last_json(trace), trace, output)


@dataclass(frozen=True, slots=True)
class Vllm:
    """vLLM on its own terms. max_num_seqs: requests decoded at once; None is vLLM's default."""

    max_num_seqs: int | None = None

    def run(self, setup: Setup, num_rows: int) -> Measured:
        output = setup.folder / "vllm.parquet"
        command = [
            *(str(vllm_python(setup)), str(SCRIPTS / "bench_vllm.py"), "--model", str(setup.vllm_model)),
            *("--rows", str(setup.rows), "--output", str(output), "--num-rows", str(num_rows), "--dtype", setup.dtype),
            *(["--max-num-seqs", str(self.max_num_seqs)] if self.max_num_seqs else []),
        ]
        trace = traced(command, setup.folder, timeout=setup.timeout_seconds)
        return _reported(last_json(trace), trace, output)


def vllm_python(setup: Setup) -> Path:
    """The Python that vLLM is installed for.

    Raises:
        Absent: there is none.
    """
    if setup.vllm_python is None or not setup.vllm_python.exists():
        raise Absent("vLLM is not installed: there is no .venv-vllm/bin/python, and --vllm-python names none")
    return setup.vllm_python


def _reported(report: Mapping[str, Any], trace: Any, output: Path) -> Measured:
    """What a process that wrote its answers to a file says of itself."""
    table = pq.read_table(output, columns=["id", "response"])
    output.unlink()
    return Measured(
        num_rows=report["num_rows"],
        num_generated_tokens=report["num_generated_tokens"],
        wall_seconds=trace.wall_seconds - report.get("warming_seconds", 0.0),
        work_seconds=report["work_seconds"],
        waiting_seconds=report.get("waiting_for_input_seconds"),
        cpu_seconds=trace.cpu_seconds_after(report["loaded_at"]) if "loaded_at" in report else None,
        peak_bytes=trace.peak_bytes,
        load_average=os.getloadavg()[0],
        engine=report.get("engine", {}),
        numerics={name: value for name, value in report.items() if isinstance(value, str)},
        answers=dict(zip(table["id"].to_pylist(), table["response"].to_pylist(), strict=True)),
    )

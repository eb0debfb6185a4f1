"""The whole program around a model whose answer is a pure function of its input, so that the right one is known.

    PYTHONPATH=tests/torture python -c "import fake_model; fake_model.start()" run dataset=images dataset.path=...

Command line, plan, worker processes, feed and ledger are the program's own; only the processor, the engine and the
checks of a real model are not. It starts without torch, in half a second.

FAKE_MODEL_POISON=ID,ID has the whole process end, as by a fault in a kernel, once one of these rows is in a batch.
FAKE_MODEL_LOG=FILE gets a line for each answer that was generated ("made KEY"), and for each that the disk has in a
journal ("kept KEY"): what may not be generated again; and one for each worker ("began ATTEMPT").
FAKE_MODEL_CLOCK=+3600 or -3600 has the process see another time of day, "frozen" one that stands still, and "jumping"
one that goes an hour forth and back. Durations have a clock of their own, and files that of their file system.
FAKE_MODEL_LEASE=SECONDS is how long a claim holds.
FAKE_MODEL_GATES=FOLDER has the process wait, before it plans and again before it takes a shard, until there is a file
FOLDER/plan or FOLDER/work; meanwhile it stands there as FOLDER/plan.PID or FOLDER/work.PID.
FAKE_MODEL_GATED=answers has it wait for FOLDER/answers alone, when its first batch is ready.
FAKE_MODEL_BATCH_ROWS=NUMBER and FAKE_MODEL_BATCH_SECONDS=SECONDS are how much it answers at once, and how fast.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import assembly, preparation, run
from pipeline.__main__ import main
from pipeline.config import RunConfig
from pipeline.plan import Plan
from pipeline.preparation import Preparation, PreparationOptions, Task
from pipeline.prompt.template import Template
from pipeline.records import Answer, EncodedSample, FinishReason
from pipeline.tensors.pool import WorkerPool
from pipeline.tensors.processor import Encoded, ProcessorSource
from pipeline.vlm.base import EngineCounts, OnToken, StopSignal
from pipeline.vlm.identity import ModelIdentity
from pipeline.write.claim import LEASE_SECONDS, Claims
from pipeline.write.journal import Journal

LOG, POISON, BATCH_ROWS = "FAKE_MODEL_LOG", "FAKE_MODEL_POISON", "FAKE_MODEL_BATCH_ROWS"
CLOCK, LEASE, GATES = "FAKE_MODEL_CLOCK", "FAKE_MODEL_LEASE", "FAKE_MODEL_GATES"
GATED, BATCH_SECONDS = "FAKE_MODEL_GATED", "FAKE_MODEL_BATCH_SECONDS"
FROZEN_AT = 1_800_000_000.0


def right_answer(images: Sequence[Image.Image], prompt: str) -> str:
    """What the model says of these pictures, and nothing else."""
    digest = hashlib.sha256(prompt.encode())
    for image in images:
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()[: 8 + digest.digest()[0] % 40]  # of any length


class FakeProcessor:
    """Puts the answer where the tokens would be."""

    neutral = None

    def __init__(self, source: ProcessorSource) -> None:
        self.source = source

    def encode(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> Encoded:
        prompt = "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
        answer = right_answer(images, prompt).encode()
        return Encoded({"input_ids": np.frombuffer(answer, np.uint8)[None]}, len(answer), len(images), ())


class FakeEngine:
    """Batches of three rows or as many as are asked for, in the time of a fast model."""

    on_token: OnToken | None = None
    dtype = "float32"
    max_new_tokens = 64
    numerics: Mapping[str, str] = {"engine": "fake"}

    def __init__(self, stop: StopSignal) -> None:
        self.counts = EngineCounts()
        self._stop = stop

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        num_rows = int(os.environ.get(BATCH_ROWS, "3"))
        seconds = float(os.environ.get(BATCH_SECONDS, "0.004"))
        poison = [name for name in os.environ.get(POISON, "").split(",") if name]
        while not self._stop.requested and (batch := list(islice(samples, num_rows))):
            pass_gate("answers")
            time.sleep(seconds)
            if any(sample.id in poison for sample in batch):
                os.kill(os.getpid(), signal.SIGKILL)
            log("made", [_words(*sample.key) for sample in batch])
            for sample in batch:
                text = bytes(sample.tensors["input_ids"][0]).decode()
                yield Answer(sample.key, sample.id, sample.facts, text, FinishReason.STOP, len(text))


class NoParity:
    """A fake model has no batches to compare."""

    num_due = 0
    report: Mapping[str, Any] = {}

    def check(self, samples: Sequence[EncodedSample]) -> None:
        assert not samples


def log(what: str, keys: Sequence[str]) -> None:
    """One write, so that lines of several processes do not mix and a kill leaves whole ones."""
    if path := os.environ.get(LOG):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, "".join(f"{what} {key}\n" for key in keys).encode())
        finally:
            os.close(descriptor)


def _words(row_index: int, prompt_name: str, sample_index: int) -> str:
    return f"{row_index}/{prompt_name}/{sample_index}"


def fake_preparation(options: PreparationOptions) -> Preparation:
    """Built in a worker process."""
    preparation.Processor = FakeProcessor  # type: ignore[misc, assignment]
    return Preparation(options)


def fake_workers(
    config: RunConfig,
    plan: Plan,
    identity: ModelIdentity,
    template: Template,
    *_: object,
    prepare: Callable[[PreparationOptions], Preparation] = fake_preparation,
) -> WorkerPool[Task, list[EncodedSample | Answer]]:
    """prepare: builds what runs in a worker process, from its own module."""
    options = assembly.preparation_options(config, identity, template, plan.fingerprint)
    return WorkerPool(
        partial(prepare, options),
        num_workers=config.engine.num_workers or 1,
        task_seconds=config.engine.worker_timeout_seconds,
        memory_bytes=config.engine.worker_memory_bytes,
        max_waiting=64,
        preload=(prepare.__module__,),
    )


def journal_that_tells(append: Any) -> Any:
    """Journal.append, which says what the disk has once it has it."""

    def told(self: Journal, rows: pa.RecordBatch) -> None:
        append(self, rows)
        keys = (rows[name].to_pylist() for name in ("row_index", "prompt_name", "sample_index"))
        log("kept", [_words(*key) for key in zip(*keys, strict=True)])

    return told


def set_clock(words: str) -> None:
    """Have this process see another time of day."""
    true_time, number = time.time, count()
    if words == "frozen":
        time.time = lambda: FROZEN_AT
    elif words == "jumping":
        time.time = lambda: true_time() + (3600, -3600)[next(number) % 2]
    elif words:
        time.time = lambda: true_time() + float(words)


def pass_gate(name: str) -> None:
    """Wait until the test opens it, so that many processes go on at one moment."""
    folder = os.environ.get(GATES)
    if folder and name in os.environ.get(GATED, "plan,work").split(","):
        gate, deadline = Path(folder) / name, time.monotonic() + 120
        gate.with_name(f"{name}.{os.getpid()}").touch()
        while not gate.exists():
            assert time.monotonic() < deadline, f"{gate} was never opened"
            time.sleep(0.005)


def claims_that_tell(work_dir: Path, attempt_id: str) -> Claims:
    """The claims of a worker, whose lease a test may choose."""
    log("began", [attempt_id])
    pass_gate("work")
    return Claims(work_dir, attempt_id, lease_seconds=float(os.environ.get(LEASE, LEASE_SECONDS)))


true_run = run.run


def fake_run(*words: Any) -> None:
    """run.run, in whichever process: a cluster starts it in others by its name."""
    install()
    true_run(*words)


def install() -> None:
    """Put the fake model in the place of the real one, once."""
    if run.run is fake_run:
        return
    run.run = fake_run  # type: ignore[assignment]
    run.refuse_model = lambda *_: None  # type: ignore[assignment]
    run.refuse_processor = lambda *_: None  # type: ignore[assignment]
    run.workers = fake_workers  # type: ignore[assignment]
    run.build_engine = lambda config, identity, batcher, stop, settle: FakeEngine(stop)  # type: ignore[assignment]
    run.parity_check = lambda *_, **__: NoParity()  # type: ignore[assignment]
    run.Claims = claims_that_tell  # type: ignore[assignment, misc]
    Journal.append = journal_that_tells(Journal.append)  # type: ignore[method-assign]


def start() -> None:
    """What `python -m pipeline` does, with the fake model."""
    install()
    set_clock(os.environ.get(CLOCK, ""))
    pass_gate("plan")
    sys.exit(main())

r"""A file for Prometheus, as node_exporter's textfile collector reads it: a worker's figures, replaced in one step.

    # HELP vlm_batch_worker_rows_total Rows that this start of the worker answered.
    # TYPE vlm_batch_worker_rows_total counter
    vlm_batch_worker_rows_total{run="/data/scans",rank="0",host="node-1"} 1200

The format is Prometheus' text exposition format, version 0.0.4: backslash, newline and (in labels) quotes are escaped;
no timestamps, which the collector refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.tracking.base import Figures, RunFigures
from pipeline.worker_stats import WorkerStats
from pipeline.write.file import replace_file

_SUFFIX = ".prom"  # the collector reads no other file
_Sample = tuple[str, str, str, float]  # name, type, help text, value


class PrometheusFile:
    """A tracker (see Tracker) that every rank has: rank 0 writes PATH, rank 3 beside it NAME-3.prom.

    Args:
        path: ends in .prom.
        run: the value of the label of that name.
    """

    def __init__(self, path: str, run: str, rank: int) -> None:
        given = Path(path).expanduser()
        self._path = given.with_stem(f"{given.stem}-{rank}") if rank else given
        self._run = run

    def log(self, figures: Figures) -> None:
        """See Tracker.

        Raises:
            OSError: the file cannot be written.
        """
        labels = {"run": self._run, "rank": figures.worker["rank"], "host": figures.worker["host"]}
        samples = [*_worker_samples(figures.worker)]
        if figures.run is not None:
            samples += _run_samples(figures.run, figures.num_records)
        text = exposition(labels, samples)
        replace_file(self._path, text.encode("utf-8", "replace"), beside=self._path.parent, durable=False)

    def close(self) -> None:
        """The file stays, with vlm_batch_worker_running 0."""


def refuse_prometheus_file(path: str) -> None:
    """Refuse a path that no collector would read.

    Raises:
        UsageError: it is none of a local .prom file.
    """
    if "://" in path or not path.endswith(_SUFFIX):
        raise UsageError(
            f"prometheus_file={path}: expected a local path that ends in {_SUFFIX}, in the folder that node_exporter "
            "was given as --collector.textfile.directory."
        )


def exposition(labels: dict[str, object], samples: list[_Sample]) -> str:
    """Samples that all have the same labels, as text."""
    pairs = ",".join(f'{name}="{_escaped(str(value), quotes=True)}"' for name, value in labels.items())
    return "".join(
        f"# HELP {name} {_escaped(doc)}\n# TYPE {name} {kind}\n{name}{{{pairs}}} {value!r}\n"
        for name, kind, doc, value in samples
    )


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def _worker_samples(worker: WorkerStats) -> Iterator[_Sample]:
    counted = {
        "num_answered": ("rows_total", "Rows that this start of the worker answered."),
        "num_errors": ("errors_total", "Error rows among them."),
        "num_generated_tokens": ("generated_tokens_total", "Tokens that it generated."),
        "waiting_for_input_seconds": ("waiting_for_input_seconds_total", "Time that its model waited for input."),
        "writing_seconds": ("writing_seconds_total", "Time that it spent on writing."),
        "seconds": ("seconds_total", "Time since it began."),
        "loading_seconds": ("loading_seconds_total", "Time that it took to load its model."),
    }
    for key, (name, doc) in counted.items():
        yield f"vlm_batch_worker_{name}", "counter", doc, float(worker[key])
    running = worker["state"] in ("loading", "running")
    yield "vlm_batch_worker_running", "gauge", "1 while it is at work, 0 once it has ended.", float(running)
    yield "vlm_batch_worker_memory_bytes", "gauge", "Resident memory of its process.", float(worker["memory_bytes"])
    heard = "When it was heard of last; an old one with running 1 is a worker that was killed."
    yield "vlm_batch_worker_heartbeat_timestamp_seconds", "gauge", heard, float(worker["updated"])


def _run_samples(run: RunFigures, num_records: int) -> Iterator[_Sample]:
    yield "vlm_batch_rows", "gauge", "Rows of the plan.", float(num_records)
    yield "vlm_batch_rows_done", "gauge", "Rows done by all workers, those of earlier starts included.", run.rows_done
    yield "vlm_batch_errors", "gauge", "Error rows among them.", run.errors
    yield "vlm_batch_workers", "gauge", "Workers that are at work.", run.workers
    rate = "Rows a second of all workers, over the last two minutes."
    yield "vlm_batch_rows_per_second", "gauge", rate, run.rows_per_second if run.workers else 0.0

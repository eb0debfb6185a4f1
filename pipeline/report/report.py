"""vlm-batch report: one HTML file that says what a run did, and shows what came out."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RunFailed
from pipeline.meter import duration
from pipeline.option import option
from pipeline.page.document import number, rendered, share
from pipeline.plan import Plan
from pipeline.report import plots
from pipeline.report.plots import Plot
from pipeline.report.records import groups_of
from pipeline.report.sample import Sample, plain_text, sample_of
from pipeline.report.throughput import throughput
from pipeline.results import Results, results_of_run
from pipeline.status import phases
from pipeline.worker_stats import WorkerStats, WorkerStatsFiles
from pipeline.write.file import Place, place, replace_file

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")
_MOST_ROWS = 30  # of a table
# What a worker says of itself from its first heartbeat on.
_SAID = {"started", "seconds", "loading_seconds", "waiting_for_input_seconds", "writing_seconds", "num_answered"}
_MOST_SETTING_CHARACTERS = 2000


@dataclass(kw_only=True, slots=True)
class ReportOptions:
    """The words that only `vlm-batch report` knows."""

    html: str | None = option(None, "file or URL to write; null = report.html in the run's folder")
    examples: int = option(12, "records shown of each kind, and twice as many random ones", least=1, most=100)
    root: str | None = option(None, "folder or URL that the source lies in now; null = where it was")


def write_report(
    output_dir: Place, options: ReportOptions | None = None, is_stopped: Callable[[], bool] = lambda: False
) -> Place:
    """Write the report of a run, finished or not; where it lies.

    is_stopped: asked while pictures are read, which takes up to a minute; the rest are left out then.

    Raises:
        UsageError: there is no run in this folder, or nothing of it is published yet.
        RunFailed: the file cannot be written.
    """
    options = options or ReportOptions()
    path = place(options.html) if options.html else output_dir / REPORT_FILE
    page = report_page(output_dir, options, is_stopped).encode("utf-8", "replace")
    # A kill leaves what is half written beside, where nobody takes it for a report.
    beside = output_dir / "stats" if options.html is None else path.parent
    try:
        replace_file(path, page, beside=beside, durable=False)
    except OSError as problem:
        raise RunFailed(f"{path} cannot be written: {problem.strerror or problem}.") from problem
    return path


def report_at_end(output_dir: Place, is_stopped: Callable[[], bool]) -> None:
    """Write the report of a run that has just ended; what goes wrong with it is a warning.

    is_stopped: as write_report() takes it.
    """
    try:
        write_report(output_dir, is_stopped=is_stopped)
    except Exception as problem:  # every answer is on disk: no drawing may make a finished run look failed
        log.warning(
            "%s is not written: %s: %s. vlm-batch report writes it anew.",
            output_dir / REPORT_FILE,
            type(problem).__name__,
            problem,
        )


def report_page(output_dir: Place, options: ReportOptions, is_stopped: Callable[[], bool] = lambda: False) -> str:
    """The HTML of a report.

    Raises:
        UsageError: as write_report().
    """
    results = results_of_run(output_dir)
    assert results.plan is not None
    plan = results.plan
    found = WorkerStatsFiles(output_dir / "stats").read(plan.plan_id)
    workers = [one for one in found if one.keys() >= _SAID]
    errors: Counter[str] = Counter()
    for summary in results.summaries.values():
        errors.update(summary.errors)
    commonest = errors.most_common()
    sample = sample_of(results, options.examples, [kind for kind, _ in commonest])
    groups = groups_of(results, sample, options.root, is_stopped)
    scored = _scored(output_dir)
    return rendered(
        _TEMPLATE,
        name=Path(str(output_dir)).name or str(output_dir),
        path=str(output_dir),
        plan=plan,
        about=_about(plan, results),
        facts=list(_facts(results, workers)),
        notes=[*_notes(results, sample), *_old_scores(scored, results)],
        endings=_bars(Counter(sample.finish_reasons).most_common(), sample.num_answers),
        errors=_bars(commonest, results.num_records),
        phases=[(name, part, share(part, 1)) for name, part in phases(workers).items()] if workers else [],
        numbers=list(_numbers(sample)),
        scores=_scores(scored),
        warnings=_bars(sample.warnings.most_common(), sample.num_records),
        plots=_plots(sample, workers) if plots.can_draw() else None,
        how_to_draw=plots.HOW_TO_DRAW,
        groups=groups,
        chips=[(group.name, group.title, len(group.cards)) for group in groups],
        parity=[worker["parity"] for worker in workers if "parity" in worker][:_MOST_ROWS],
        settings=[(key, _setting(value)) for key, value in sorted(plan.settings.items())],
        versions=sorted(plan.versions.items()),
        numerics=_numerics(results),
    )


def _about(plan: Plan, results: Results) -> list[tuple[str, str]]:
    """What the run asked whom."""
    settings = plan.settings
    variants = settings.get("prompt.variants") or {}
    told = {
        "Model": settings.get("vlm.path"),
        "Data": settings.get("dataset.path"),
        **({f"Prompt {name}": text for name, text in variants.items()} or {"Prompt": settings.get("prompt.user")}),
        "Planned": plan.created,
    }
    return [(name, plain_text(value, _MOST_SETTING_CHARACTERS)) for name, value in told.items() if value]


def _facts(results: Results, workers: Sequence[WorkerStats]) -> Iterator[tuple[str, str, str | None]]:
    assert results.plan is not None
    left = None if results.complete else f"of {number(results.plan.num_records)} planned"
    yield "Records", number(results.num_records), left
    num_errors = results.num_errors
    yield "Errors", number(num_errors), share(num_errors, results.num_records)
    num_tokens = sum(summary.num_generated_tokens for summary in results.summaries.values())
    answers = results.num_records - num_errors
    mean = f"{num_tokens / answers:.1f} an answer" if answers else None
    yield "Generated tokens", number(num_tokens), mean
    if (found := throughput(workers)) is not None:
        seconds = float(found.edges_seconds[-1])
        answered = sum(worker["num_answered"] for worker in workers)
        starts = f"{len(workers)} starts of workers" if len(workers) > 1 else None
        yield "Time at work", duration(seconds), starts
        counted = "models loading included" if results.complete else "with those of unfinished shards"
        yield "Records a second", f"{answered / seconds:,.1f}", counted
        yield "Waiting for input", share(phases(workers)["waiting for input"], 1), "of the workers' time"


def _notes(results: Results, sample: Sample) -> Iterator[str]:
    """What a reader has to know before believing the numbers."""
    plan = results.plan
    assert plan is not None
    if not results.complete:
        yield (
            f"The run is not finished: {number(len(results.summaries))} of {number(plan.num_shards)} shards are "
            "published, and this page is about those."
        )
    if sample.num_records < results.num_records:
        yield (
            "Records, errors and generated tokens are counted in all shards. All else is of a random sample: "
            f"{number(sample.num_records)} records in {number(sample.num_files)} of {number(len(results.files))} "
            "shards."
        )
    for problem in sample.damaged[:_MOST_ROWS]:
        yield f"A shard could not be read and is left out: {problem}"


def _bars(counts: Sequence[tuple[str, int]], whole: int) -> list[tuple[str, float, str]]:
    shown = counts[:_MOST_ROWS]
    bars = [(name, count / max(1, whole), f"{number(count)} ({share(count, whole)})") for name, count in shown]
    if left := sum(count for _, count in counts[_MOST_ROWS:]):
        bars.append(
            (f"{len(counts) - _MOST_ROWS} others", left / max(1, whole), f"{number(left)} ({share(left, whole)})")
        )
    return bars


def _numbers(sample: Sample) -> Iterator[tuple[str, ...]]:
    """Rows of the table of lengths and sizes: median, 95 % and most."""
    titles = {
        "num_generated_tokens": "Tokens of an answer",
        "num_prompt_tokens": "Tokens of a prompt",
        "num_image_tokens": "of them for pictures",
    }
    named = [(title, sample.numbers[name]) for name, title in titles.items()]
    for title, values in [*named, ("Width of a picture", sample.widths), ("Height of a picture", sample.heights)]:
        if len(values):
            yield title, *(number(int(value)) for value in np.percentile(values, (0, 50, 95, 100), method="nearest"))


def _scored(output_dir: Place) -> dict[str, Mapping[str, Any]] | str:
    """What vlm-batch score has left, by metric; or why it cannot be read."""
    try:
        content = json.loads((output_dir / "score.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as problem:
        return f"score.json cannot be read: {problem}"
    found = content.items() if isinstance(content, dict) else ()
    return {str(name): one for name, one in found if isinstance(one, Mapping) and _is_number(one.get("value"))}


def _scores(scored: dict[str, Mapping[str, Any]] | str) -> list[tuple[str, str, str, str]]:
    """Rows of the table of scores."""
    if isinstance(scored, str):
        return [(scored, "", "", "")]
    rows = []
    for metric, found in scored.items():
        low, high = found.get("low"), found.get("high")
        interval = f"{low:.4f} to {high:.4f}" if _is_number(low) and _is_number(high) else ""
        rows.append((metric, f"{found['value']:.4f}", interval, str(found.get("num_rows", ""))))
    return rows


def _old_scores(scored: dict[str, Mapping[str, Any]] | str, results: Results) -> Iterator[str]:
    """That the run has changed since it was scored."""
    now = {"num_records": results.num_records, "num_error_records": results.num_errors}
    for found in scored.values() if isinstance(scored, dict) else ():
        then = {name: found.get(name, count) for name, count in now.items()}
        if then != now:
            yield (
                f"The scores are of an earlier state of the run, {then['num_records']} records with "
                f"{then['num_error_records']} errors among them: vlm-batch score makes new ones."
            )
            return


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plots(sample: Sample, workers: Sequence[WorkerStats]) -> list[Plot]:
    tokens = sample.numbers["num_generated_tokens"]
    drawn = [
        plots.histogram("Length of answers", tokens, "generated tokens", _spread(tokens)),
        plots.scatter(
            "Size of pictures",
            sample.widths,
            sample.heights,
            ("width, pixels", "height, pixels"),
            f"Larger dots are commoner sizes. Width: {_spread(sample.widths)} Height: {_spread(sample.heights)}",
        ),
    ]
    found = throughput(workers)
    if found is not None and len(found.rows_per_second) > 2:
        unit, seconds = next((one for one in _UNITS if found.edges_seconds[-1] >= 3 * one[1]), _UNITS[-1])
        edges, breaks = found.edges_seconds / seconds, [place / seconds for place in found.breaks_seconds]
        gaps = " Dotted: nobody was at work, and the time is left out." if breaks else ""
        most = f"At most {found.rows_per_second.max():,.1f} rows/s.{gaps}"
        waiting = f"At most {share(found.waiting_share.max(), 1)} of the workers' time.{gaps}"
        units = (unit, "rows a second"), (unit, "percent of the workers' time")
        drawn += [
            plots.steps("Throughput", edges, found.rows_per_second, units[0], breaks, most),
            plots.steps("Waiting for input", edges, 100 * found.waiting_share, units[1], breaks, waiting),
        ]
    return [plot for plot in drawn if plot is not None]


_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def _spread(values: np.ndarray[Any, Any]) -> str:
    if not len(values):
        return ""
    median, most = (int(value) for value in np.percentile(values, (50, 95), method="nearest"))
    return f"Half have at most {number(median)}, 95 % at most {number(most)}; the most is {number(int(values.max()))}."


def _setting(value: Any) -> str:
    return plain_text(value, _MOST_SETTING_CHARACTERS)


def _numerics(results: Results) -> tuple[list[tuple[str, bool]], list[list[str]]]:
    """Columns and rows of the table of what shards were computed with."""
    kinds = Counter(json.dumps(dict(one.numerics), sort_keys=True) for one in results.summaries.values())
    told = [(count, json.loads(kind)) for kind, count in kinds.most_common(_MOST_ROWS)]
    names = list(dict.fromkeys(name for _, kind in told for name in kind))
    columns = [("shards", True), *((name, False) for name in names)]
    return columns, [[number(count), *(str(kind.get(name, "")) for name in names)] for count, kind in told]

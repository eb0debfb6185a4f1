"""Scores as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.score.bootstrap import Interval
from pipeline.score.metric import Metric
from pipeline.score.options import ScoreOptions
from pipeline.score.predictions import ResultsTable
from pipeline.score.scoring import Score, Scores
from pipeline.write.file import Place

_MOST_GROUPS = 20
_MOST_LETTERS = 40  # of the name of a group
_HEADINGS = ("value", "95 % interval", "rows", "errors")


def score_lines(scores: Scores, options: ScoreOptions, files: Sequence[Place]) -> Iterator[str]:
    """The scores, what was left out of them, and where they are written."""
    yield f"predictions  {scores.table.path}, {scores.response_column}"
    source = f"{options.reference}, {options.reference_column}" if scores.has_gold else f"column {options.reference}"
    yield f"reference    {source}"
    yield from _remarks(scores)
    yield ""
    of_all = [_row(metric.name, metric, score) for metric, score in zip(scores.metrics, scores.overall, strict=True)]
    yield from _aligned([("metric", *_HEADINGS), *of_all])
    for metric, score in zip(scores.metrics, scores.overall, strict=True):
        for name, part in score.parts.items():
            yield f"  {metric.name} {name}: {_value(part.value, metric)}  {_range(part, metric)}"
        for name, number in score.counts.items():
            yield f"  {metric.name} {name}: {number:,}"
    if scores.groups:
        yield from _group_lines(scores, str(options.by))
    yield ""
    yield from (f"written      {path}" for path in files)


def _remarks(scores: Scores) -> Iterator[str]:
    """What a reader of the numbers has to know."""
    results = scores.table.results if isinstance(scores.table, ResultsTable) else None
    if results is not None and not results.complete and results.plan is not None:
        yield f"unfinished   {results.num_records:,} of {_records(results.plan.num_records)} of the run are there"
    errors = scores.overall[0].num_errors
    if errors:
        yield f"errors       {_records(errors)} without an answer, counted as wrong"
    if scores.num_without_reference:
        what = " in the reference file" if scores.has_gold else ""
        yield f"left out     {_records(scores.num_without_reference)} without a reference{what}"
    if scores.num_unused_references:
        yield f"not asked    {scores.num_unused_references:,} of the ids in the reference file, which no record has"
    if scores.num_repeated:
        yield f"repeated     {_records(scores.num_repeated)} with the id, prompt and sample of another; all count"


def _records(number: int) -> str:
    return f"{number:,} record{'' if number == 1 else 's'}"


def _group_lines(scores: Scores, by: str) -> Iterator[str]:
    for number, metric in enumerate(scores.metrics):
        rows = [_row(_shortened(name), metric, of[number]) for name, of in list(scores.groups.items())[:_MOST_GROUPS]]
        yield ""
        yield from _aligned([(f"{metric.name} by {by}", *_HEADINGS), *rows])
    if len(scores.groups) > _MOST_GROUPS:
        yield f"and {len(scores.groups) - _MOST_GROUPS:,} smaller groups, which are in the JSON file"


def _row(name: str, metric: Metric, score: Score) -> tuple[str, ...]:
    interval = score.interval
    return (
        name,
        _value(interval.value, metric),
        _range(interval, metric),
        f"{score.num_rows:,}",
        f"{score.num_errors:,}",
    )


def _value(value: float | None, metric: Metric) -> str:
    if value is None:
        return "undefined"
    return f"{value:.2f}" if metric.best == 100 else f"{value:.4f}"


def _range(interval: Interval, metric: Metric) -> str:
    if interval.low is None or interval.high is None:
        return "-"
    return f"{_value(interval.low, metric)} - {_value(interval.high, metric)}"


def _shortened(name: str | None) -> str:
    if name is None:
        return "(null)"
    name = " ".join(name.split())
    return name if len(name) <= _MOST_LETTERS else name[: _MOST_LETTERS - 3] + "..."


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns one under the other: the first to the left, the others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

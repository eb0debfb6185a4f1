"""What `vlm-batch score` computes: every metric of every record, their values and intervals, as a whole and by group.

The texts are read file by file, twice where a metric learns from the references first; what is kept of a record are its
id and the statistics of the metrics, 8 bytes each (1 of exact_match, 10 of bleu, 18 of chrf).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.score.bootstrap import Interval, Resamples
from pipeline.score.cells import group_of, options_of, text_of, texts_of
from pipeline.score.gold import Gold, read_gold
from pipeline.score.metric import Array, Cases, Metric, UnusableCase
from pipeline.score.options import ScoreOptions
from pipeline.score.predictions import Identity, LinesTable, ResultsTable, identity, identity_columns, table_at
from pipeline.score.registry import metrics_named

_REFERENCE, _OPTIONS, _GROUP = "reference", "options", "group"


@dataclass(frozen=True, slots=True)
class Score:
    """A metric of some records."""

    interval: Interval
    num_rows: int  # records, those without an answer included
    num_errors: int  # records without an answer
    parts: Mapping[str, Interval]
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Scores:
    """Everything that is told of a scoring."""

    table: ResultsTable | LinesTable
    response_column: str
    metrics: Sequence[Metric]
    overall: Sequence[Score]  # in the order of the metrics
    groups: Mapping[str | None, Sequence[Score]]  # largest first
    records: Identity  # those that were scored
    row_scores: Sequence[Array]  # of each metric, in the order of the records
    num_without_reference: int
    num_repeated: int  # records whose id, prompt and sample came before
    num_unused_references: int  # ids of the reference file that no record has
    has_gold: bool


@dataclass(slots=True)
class _Gathered:
    """What is kept of the records."""

    records: Identity = field(default_factory=lambda: Identity([], [], [], []))
    groups: list[str | None] = field(default_factory=list)
    statistics: list[list[Array]] = field(default_factory=list)  # of each batch, of each metric
    is_error: list[bool] = field(default_factory=list)
    num_without_reference: int = 0


@dataclass(frozen=True, slots=True)
class _Batch:
    records: Identity
    cases: Cases
    groups: list[str | None]
    num_without_reference: int


def score(options: ScoreOptions) -> Scores:
    """Score answers.

    Raises:
        UsageError: a word, column, id or reference is wrong, or a package is missing.
        RunFailed: a file is damaged.
    """
    options.check()
    metrics = metrics_named(options.metrics)
    source = _Source(options)
    if any(metric.learns for metric in metrics):
        metrics = [metric.learned(source.references()) if metric.learns else metric for metric in metrics]
    gathered = _Gathered()
    for batch in source.batches():
        _gather(gathered, batch, metrics)
    if not gathered.is_error:
        raise UsageError(source.no_reference())
    return _scores(options, source, metrics, gathered)


class _Source:
    """The records with their references, wherever those come from."""

    def __init__(self, options: ScoreOptions) -> None:
        assert options.predictions is not None and options.reference is not None
        self.options = options
        self.table = table_at(options.predictions)
        wanted = {_OPTIONS: options.options_column, _GROUP: options.by}
        if options.reference_column is None:
            wanted[_REFERENCE] = options.reference
            self.gold: Gold | None = None
        else:
            elsewhere = [name for name in wanted.values() if name and not self.table.has(name)]
            columns = list(dict.fromkeys([options.reference_column, *elsewhere]))
            self.gold = read_gold(options.reference, options.reference_id_column, columns)
        self._in_gold = {kind: name for kind, name in wanted.items() if self.gold and name in self.gold.columns}
        if options.reference_column is not None:
            self._in_gold[_REFERENCE] = options.reference_column
        here = {kind: name for kind, name in wanted.items() if name and kind not in self._in_gold}
        self._asked = {kind: self.table.column(name) for kind, name in here.items()}
        self.response_column = options.response_column or "response"
        if not self.table.has(self.response_column) and options.response_column is None:
            raise UsageError(f"{self.table.path} has no column 'response': name the answers' with response_column=.")
        self._asked["response"] = self._response(options.response_column)
        if isinstance(self.table, ResultsTable):
            self.response_column = self.table.results.in_file(self._asked["response"])
        if self.table.run is not None and options.id_column != "id":
            raise UsageError(
                f"id_column={options.id_column}: the records of a run go by the ids that it gave them, in the column "
                "'id'; dataset.id_column= of the run chooses others."
            )
        self._identity = identity_columns(self.table, options.id_column)
        if self.gold is not None and self._identity["id"] is None:
            self.table.column(options.id_column)  # says that it is not there
        self._examples: list[str] = []
        self._joined: set[str] = set()  # ids of the file that some record has

    def _response(self, named: str | None) -> str:
        """The run's own answers, unless another column is named."""
        if named is None and isinstance(self.table, ResultsTable) and "response" in self.table.results.names:
            return "response"
        return self.table.column(named or "response")

    def batches(self) -> Iterator[_Batch]:
        """The records that have a reference."""
        for records, values in self._read():
            num = len(records.ids)
            self._examples = self._examples or records.ids[:2]
            columns = {kind: values[kind] for kind in self._asked}
            if self.gold is not None:
                self._joined.update(row_id for row_id in records.ids if row_id in self.gold.rows)
                gold = dict(zip(self.gold.columns, self.gold.values(records.ids), strict=True))
                columns |= {kind: gold[name] for kind, name in self._in_gold.items()}
            yield self._batch(records, columns, num)

    def references(self) -> Iterator[Sequence[str]]:
        """The references of each row of the input that has some, once: its records lie beside each other."""
        last: str | None = None
        for batch in self.batches():
            for row_id, references in zip(batch.records.ids, batch.cases.references, strict=True):
                if row_id != last:
                    yield references
                last = row_id

    @property
    def num_unused_references(self) -> int:
        return len(self.gold.rows) - len(self._joined) if self.gold is not None else 0

    def no_reference(self) -> str:
        """Why nothing could be scored."""
        if self.gold is None:
            return f"{self.table.path}: no record has a reference in {self.options.reference!r}; all are null."
        ours, theirs = ", ".join(map(repr, self._examples)), ", ".join(map(repr, list(self.gold.rows)[:2]))
        words = "reference_id_column=" if self.table.run is not None else "id_column= and reference_id_column="
        return (
            f"{self.gold.path}: no id is one of the predictions', or all its answers are null. The predictions' ids "
            f"are such as {ours}, the file's such as {theirs}. See {words}."
        )

    def _read(self) -> Iterator[tuple[Identity, dict[str, list[Any]]]]:
        kinds = {kind: column for kind, column in self._identity.items() if column is not None}
        columns = {**{f"identity.{kind}": column for kind, column in kinds.items()}, **self._asked}
        start = 0
        for lists in self.table.batches(list(columns.values())):
            values = dict(zip(columns, lists, strict=True))
            num = len(values["response"])
            yield identity({kind: values.get(f"identity.{kind}") for kind in self._identity}, num, start), values
            start += num

    def _batch(self, records: Identity, columns: Mapping[str, list[Any]], num: int) -> _Batch:
        readers = {_REFERENCE: texts_of, "response": text_of, _OPTIONS: options_of, _GROUP: group_of}
        kept: list[int] = []
        found: dict[str, list[Any]] = {kind: [] for kind in columns}
        for place, row_id in enumerate(records.ids):
            if not self._cell(_REFERENCE, row_id, texts_of, columns[_REFERENCE][place]):
                continue
            kept.append(place)
            for kind, values in columns.items():
                found[kind].append(self._cell(kind, row_id, readers[kind], values[place]))
        cases = Cases(found["response"], found[_REFERENCE], found.get(_OPTIONS))
        return _Batch(_taken(records, kept), cases, found.get(_GROUP, [None] * len(kept)), num - len(kept))

    def _cell(self, kind: str, row_id: str, read: Any, value: Any) -> Any:
        try:
            return read(value)
        except UsageError as problem:
            raise UsageError(f"record {row_id!r}, {kind}: {problem}.") from None


def _taken(records: Identity, places: Sequence[int]) -> Identity:
    return Identity(
        [records.ids[place] for place in places],
        [records.row_indices[place] for place in places],
        [records.prompt_names[place] for place in places],
        [records.sample_indices[place] for place in places],
    )


def _gather(gathered: _Gathered, batch: _Batch, metrics: Sequence[Metric]) -> None:
    try:
        gathered.statistics.append([metric.rows(batch.cases) for metric in metrics])
    except UnusableCase as problem:
        raise UsageError(f"record {batch.records.ids[problem.position]!r}: {problem}") from None
    for mine, theirs in zip(_lists(gathered.records), _lists(batch.records), strict=True):
        mine.extend(theirs)
    gathered.groups.extend(batch.groups)
    gathered.is_error.extend(response is None for response in batch.cases.responses)
    gathered.num_without_reference += batch.num_without_reference


def _lists(records: Identity) -> tuple[list[Any], ...]:
    return records.ids, records.row_indices, records.prompt_names, records.sample_indices


def _scores(options: ScoreOptions, source: _Source, metrics: Sequence[Metric], gathered: _Gathered) -> Scores:
    records = gathered.records
    by_metric = [np.concatenate(parts) for parts in zip(*gathered.statistics, strict=True)]
    widths = np.cumsum([0, *(statistics.shape[1] for statistics in by_metric)])
    columns = [slice(start, stop) for start, stop in pairwise(widths)]
    everything = np.concatenate(by_metric, 1)
    is_error = np.array(gathered.is_error)
    clusters = _numbers(records.ids)

    def of_records(places: NDArray[np.intp] | slice) -> list[Score]:
        resamples = Resamples(everything[places], clusters[places], seed=options.seed)
        num_errors = int(is_error[places].sum())
        return [_score(metric, resamples, part, num_errors) for metric, part in zip(metrics, columns, strict=True)]

    groups = {group: of_records(places) for group, places in _groups(gathered.groups)} if options.by else {}
    repeated = Counter(zip(records.ids, records.prompt_names, records.sample_indices, strict=True))
    return Scores(
        table=source.table,
        response_column=source.response_column,
        metrics=metrics,
        overall=of_records(slice(None)),
        groups=groups,
        records=records,
        row_scores=[metric.row_scores(rows) for metric, rows in zip(metrics, by_metric, strict=True)],
        num_without_reference=gathered.num_without_reference,
        num_repeated=len(records.ids) - len(repeated),
        num_unused_references=source.num_unused_references,
        has_gold=source.gold is not None,
    )


def _score(metric: Metric, resamples: Resamples, columns: slice, num_errors: int) -> Score:
    sums_S = resamples.sums_S[columns]
    parts = {
        name: resamples.interval(lambda sums, num, name=name: metric.parts(sums, num)[name], columns)  # type: ignore[misc]
        for name in metric.parts(sums_S[None], np.ones(1))
    }
    return Score(resamples.interval_of(metric, columns), resamples.num_rows, num_errors, parts, metric.counts(sums_S))


def _numbers(ids: Sequence[str]) -> NDArray[np.intp]:
    """A number for each record, the same for the same id."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(row_id, len(numbers)) for row_id in ids], np.intp)


def _groups(groups: Sequence[str | None]) -> Iterator[tuple[str | None, NDArray[np.intp]]]:
    """The places of the records of each group, the largest group first, then by name."""
    places: dict[str | None, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    for group in sorted(places, key=lambda group: (-len(places[group]), group is None, group or "")):
        yield group, np.array(places[group], np.intp)

"""A shard in work: what is wanted of it, and what has been answered, by this worker and by others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.records import Answer, RecordKey, Shard
from pipeline.write.goal import Wanted
from pipeline.write.journal import Appendable
from pipeline.write.schema import OutputSchema, ShardSummary, journal_row
from pipeline.write.suspects import NOBODY, Suspects, Taken


@dataclass(slots=True)
class OpenShard:
    """What a ledger knows of a shard; whoever changes it holds the ledger's lock."""

    shard: Shard
    wanted: Wanted
    taken: Taken
    has_company: bool = False  # another worker is at it, too
    suspects: Suspects = NOBODY
    journal: Appendable | None = None
    batches: list[pa.RecordBatch] = field(default_factory=list)  # on disk, in a journal
    pending: list[dict[str, Any]] = field(default_factory=list)  # not yet
    seen: set[RecordKey] = field(default_factory=set)
    by_others: set[RecordKey] = field(default_factory=set)  # of these, what was found in journals
    errors: Counter[str] = field(default_factory=Counter)  # by "stage/type"
    sizes_read: dict[str, int] = field(default_factory=dict)  # of journals, by name

    @property
    def is_complete(self) -> bool:
        return len(self.seen) == len(self.wanted.attempts)

    def add(self, answer: Answer, columns: Mapping[str, Any], schema: OutputSchema) -> None:
        """An answer of this worker, and the input columns of its row."""
        assert answer.key not in self.seen, f"{answer.key} was answered twice"
        self.seen.add(answer.key)
        self.pending.append(journal_row(answer, columns, schema, self.wanted.attempts[answer.key]))
        if answer.fault is not None:
            self.errors[f"{answer.fault.stage}/{answer.fault.kind}"] += 1

    def take_over(self, batch: pa.RecordBatch) -> tuple[int, Counter[str]]:
        """Answers of a journal, some of which others may have, too: how many were lacking, and their errors."""
        fresh = [key in self.wanted.attempts and key not in self.seen for key in _keys(batch)]
        batch = batch.filter(pa.array(fresh, pa.bool_()))
        keys, errors = _keys(batch), _errors(batch)
        self.batches.append(batch)
        self.seen.update(keys)
        self.by_others.update(keys)
        self.errors.update(errors)
        return len(keys), errors

    def rest(self, summary: ShardSummary) -> tuple[int, Counter[str]]:
        """Of a shard that another worker has published, what was not known here: how many records, and their errors."""
        num_known = self.wanted.num_settled + len(self.seen)
        return summary.num_rows - num_known, Counter(summary.errors) - self.errors

    def close_journal(self) -> None:
        """A later append goes into another file."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None


def _keys(batch: pa.RecordBatch) -> list[RecordKey]:
    columns = (batch.column(name).to_pylist() for name in ("row_index", "prompt_name", "sample_index"))
    return [RecordKey(*values) for values in zip(*columns, strict=True)]


def _errors(rows: pa.RecordBatch) -> Counter[str]:
    """Error records by "stage/type"."""
    pairs = zip(rows["error_stage"].to_pylist(), rows["error_type"].to_pylist(), strict=True)
    return Counter(f"{stage}/{kind}" for stage, kind in pairs if stage is not None)

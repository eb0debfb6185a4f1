"""What is wanted of a shard: which keys have to be answered, and what becomes of the answers once all are there.

FirstAnswers    every key of a shard that is not published yet (pipeline.write.retry has the other goal)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import RunFailed
from pipeline.records import RecordKey, Shard
from pipeline.write.file import Place
from pipeline.write.object_store import ObjectPath
from pipeline.write.schema import OutputSchema, ShardSummary
from pipeline.write.shard import publish_shard, shard_files, summary_of_plan


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a shard lacks."""

    stem: str  # its files in work/ begin with it
    generation: int  # of the file that will hold the answers: 0 for the first ones
    attempts: Mapping[RecordKey, int]  # every key to answer, and the how-manieth time it is asked
    num_settled: int = 0  # records of the shard that stay as they are
    settled_errors: Mapping[str, int] = field(default_factory=dict)  # of these, by "stage/type"


PLAN_FILE = "plan.json"


def plan_id_of(output_dir: Place) -> str | None:
    """The id of the plan that the folder has now; None where there is none."""
    try:
        found = json.loads((output_dir / PLAN_FILE).read_text(encoding="utf-8"))["plan_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found)


class Goal(Protocol):
    """What a worker wants of its shards."""

    schema: OutputSchema
    plan_id: str

    def stem(self, shard: Shard) -> str:
        """What the names of a shard's files in work/ begin with."""
        ...

    def wanted(self, shard: Shard) -> Wanted: ...

    def reached(self, shard: Shard) -> ShardSummary | None:
        """The summary of the shard's file, once it holds what is wanted; else None."""
        ...

    def done_meanwhile(self) -> Collection[int]:
        """Shards that have been finished since this start looked, as one listing tells; not all where it cannot."""
        ...

    @property
    def looks_cost(self) -> bool:
        """Whether each look at the output is a request that somebody pays for."""
        ...

    def publish(
        self, shard: Shard, wanted: Wanted, journal: pa.Table, *, numerics: Mapping[str, str], attempt_path: Place
    ) -> bool:
        """Give the shard its answers, in the columns of a journal; False if another worker was quicker.

        Raises:
            RunFailed: the disk is full, the folder is gone, or what was written does not read back.
        """
        ...


class FirstAnswers:
    """Every record of a shard, published where there was none.

    Args:
        constants: model_id, model_revision and run_id, the same in every record.
        foreign: numbers of shards under whose names this start has found something else.
    """

    def __init__(
        self,
        output_dir: Place,
        schema: OutputSchema,
        *,
        plan_id: str,
        prompt_names: Sequence[str],
        num_samples: int,
        constants: Mapping[str, str | None],
        compression: str,
        foreign: Collection[int] = (),
    ) -> None:
        self._foreign = frozenset(foreign)
        self.schema, self.plan_id = schema, plan_id
        self._output_dir, self.data_dir = output_dir, output_dir / "data"
        self.prompt_names, self._num_samples = tuple(prompt_names), num_samples
        self.constants, self.compression = constants, compression

    def stem(self, shard: Shard) -> str:
        return shard.name

    def wanted(self, shard: Shard) -> Wanted:
        """Every key of the shard.

        Raises:
            RunFailed: a folder has the shard's name.
        """
        if self.final(shard).is_dir():
            raise RunFailed(f"{self.final(shard)} is a folder where a shard has to be; move it away and run again.")
        return Wanted(self.stem(shard), 0, dict.fromkeys(self.keys(shard), 1))

    def reached(self, shard: Shard) -> ShardSummary | None:
        return summary_of_plan(self.final(shard), self.plan_id)

    def done_meanwhile(self) -> Collection[int]:
        return {number for number, _ in shard_files(self.data_dir)} - self._foreign

    @property
    def looks_cost(self) -> bool:
        return isinstance(self.data_dir, ObjectPath)

    def publish(
        self, shard: Shard, wanted: Wanted, journal: pa.Table, *, numerics: Mapping[str, str], attempt_path: Place
    ) -> bool:
        table = in_input_order(self.schema.publish(journal, self.constants), self.schema, self.prompt_names)
        return publish_shard(
            table,
            summary_of(table, self.schema, self.plan_id, shard, numerics),
            final=self.final(shard),
            attempt_path=attempt_path,
            compression=self.compression,
            confirm=self.confirm,
        )

    def confirm(self) -> None:
        """Nothing of an old plan is given a name.

        Raises:
            RunFailed: the folder has another plan by now.
        """
        if plan_id_of(self._output_dir) != self.plan_id:
            raise RunFailed(
                f"{self._output_dir} has another plan by now (resume=overwrite, or its {PLAN_FILE} is gone): the "
                "answers of this worker belong to the old one and are not published."
            )

    def final(self, shard: Shard) -> Place:
        """Where the shard's file is, or will be."""
        return self.data_dir / f"{shard.name}.parquet"

    def keys(self, shard: Shard) -> list[RecordKey]:
        """All keys of a shard, in order."""
        return [
            RecordKey(row_index, name, sample_index)
            for row_index in range(shard.start, shard.stop)
            for name in self.prompt_names
            for sample_index in range(self._num_samples)
        ]


def in_input_order(table: pa.Table, schema: OutputSchema, prompt_names: Sequence[str]) -> pa.Table:
    """A shard's records in input order and in one piece: the file does not depend on when its answers came."""
    places = {name: number for number, name in enumerate(prompt_names)}
    names = table[schema.column("prompt_name")].to_pylist()
    keys = pa.table(
        {
            "row": table[schema.column("row_index")],
            "prompt": pa.array([places[name] for name in names], pa.int32()),
            "sample": table[schema.column("sample_index")],
        }
    )
    indices = pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names])
    return table.take(indices).combine_chunks()


def summary_of(
    table: pa.Table, schema: OutputSchema, plan_id: str, shard: Shard, numerics: Mapping[str, str], generation: int = 0
) -> ShardSummary:
    """What the footer says of a shard's records."""
    errors = error_counts(table, schema)
    return ShardSummary(
        plan_id=plan_id,
        shard=shard.number,
        num_rows=len(table),
        num_errors=errors.total(),
        errors=dict(errors),
        num_generated_tokens=pc.sum(table[schema.column("num_generated_tokens")]).as_py() or 0,
        numerics=dict(numerics),
        generation=generation,
    )


def error_counts(table: pa.Table, schema: OutputSchema) -> Counter[str]:
    """Error records of a published table, by "stage/type"."""
    stages, kinds = (table[schema.column(name)].to_pylist() for name in ("error_stage", "error_type"))
    return Counter(f"{stage}/{kind}" for stage, kind in zip(stages, kinds, strict=True) if stage is not None)


def record_keys(table: pa.Table, schema: OutputSchema) -> list[RecordKey]:
    """The keys of a published table's records."""
    columns = (table[schema.column(name)].to_pylist() for name in ("row_index", "prompt_name", "sample_index"))
    return [RecordKey(*values) for values in zip(*columns, strict=True)]

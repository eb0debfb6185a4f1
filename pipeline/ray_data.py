"""Answers as a stage of somebody else's pipeline in Ray Data.

    dataset.map_batches(
        Answers,
        fn_constructor_args=[["vlm=auto", "vlm.path=MODEL", "prompt.user=What is it?", "dataset.id_column=name"]],
        batch_format="pyarrow", batch_size=256, concurrency=8, num_gpus=1,
    )

The stages are those of a run; plan, journal and shards are not there: what is not yet written when Ray's job ends is
lost, and another start begins anew. cluster=ray is what resumes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from pipeline.assembly import build_engine, preparation_options, preparation_pool, refuse_model
from pipeline.compose import compose
from pipeline.config import answer_settings
from pipeline.dataset.base import FILES_SCHEMA, Inputs
from pipeline.dataset.files import Span
from pipeline.dataset.table import kept_columns, plain_schema, rows_in, table_rows
from pipeline.errors import UsageError
from pipeline.intake import Intake
from pipeline.plan import fingerprint
from pipeline.preparation import Task
from pipeline.ranks import Ranks
from pipeline.records import Answer, EncodedSample, RecordKey, Row
from pipeline.run import checked
from pipeline.tensors.batch import Batcher
from pipeline.tensors.pool import WorkerPool
from pipeline.vlm.generation import effective_settings
from pipeline.vlm.identity import identify
from pipeline.write.schema import OutputSchema, journal_row

if TYPE_CHECKING:
    import numpy as np

Batch: TypeAlias = "pa.Table | dict[str, np.ndarray[Any, Any]]"


class Answers:
    """Batches of rows in, batches of answers out: the columns that a run would write, one row for each answer.

    A row that cannot be answered has status=error and says why, as in a run. row_index counts within the batch; ids are
    unique if dataset.id_column names such a column; run_id is null.

    Args:
        words: key=value, as on the command line. The keys of dataset say which column holds the images (encoded bytes,
            {bytes, path}, or paths); those of write and cluster, but for the names of columns, say nothing here.
        num_sharing: how many of these share a host, and so its cores.

    Raises:
        UsageError, RunFailed: the settings or the model cannot work. A batch raises them, too, but never for a row.
    """

    def __init__(self, words: Sequence[str], num_sharing: int = 1) -> None:
        os.environ.update(Ranks(0, num_sharing, 0, num_sharing).environment)
        config = compose(["dataset=parquet", "dataset.path=batch", *words]).config
        self._config, self._identity = config, identify(config.vlm)
        refuse_model(config, self._identity)
        from pipeline.vlm.stream import Halt

        self._batcher = Batcher(
            max_rows=config.engine.max_batch_rows,
            max_tokens=config.engine.max_batch_tokens,
            max_new_tokens=config.generation.max_new_tokens,
        )
        self._engine = build_engine(config, self._identity, self._batcher, Halt())
        self._schema: OutputSchema | None = None
        self._seen: pa.Schema | None = None
        self._pool: WorkerPool[Task, list[EncodedSample | Answer]] | None = None
        atexit.register(self.close)  # processes that are there at the end are waited for

    def close(self) -> None:
        """End the processes that prepare rows; another batch starts them anew."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    def __call__(self, batch: Batch) -> Batch:
        """The answers to a batch, as it came: a pyarrow Table, or arrays of numpy by name."""
        given = batch if isinstance(batch, pa.Table) else _table(batch)
        columns, _ = kept_columns(self._config.dataset, plain_schema(given.schema))
        inputs = Inputs(os.getcwd(), FILES_SCHEMA.empty_table(), columns)
        schema = self._fitting(inputs)
        table, span = table_rows(self._config.dataset, inputs), Span(0, "batch", 0, 0, 0, len(given))
        rows: list[Row] = []
        for part in given.select(table.needed).to_batches():
            rows += rows_in(table, part, len(rows), span)
        by_key = {answer.key: answer for answer in self._answers(rows)}
        lines = [journal_row(by_key[key], row.columns, schema, attempt=1) for row in rows for key in self._keys(row)]
        constants = {"model_id": self._identity.model_id, "model_revision": self._identity.revision, "run_id": None}
        answers: pa.Table = schema.publish(pa.Table.from_pylist(lines, schema.journal), constants)
        if isinstance(batch, pa.Table):
            return answers
        plain = answers.cast(plain_schema(answers.schema))  # numpy has no dictionaries
        return {name: plain[name].to_numpy() for name in plain.schema.names}

    def _answers(self, rows: Sequence[Row]) -> list[Answer]:
        assert self._pool is not None
        answers: list[Answer] = []
        tasks = iter([Task(row, tuple(self._keys(row))) for row in rows])
        for answer in self._engine.answers(Intake(self._pool.results(tasks), answers.append, self._pool.has_results)):
            answers.append(answer)
        return answers

    def _keys(self, row: Row) -> Iterator[RecordKey]:
        for name in self._config.prompt_names:
            for sample_index in range(self._config.generation.n):
                yield RecordKey(row.index, name, sample_index)

    def _fitting(self, inputs: Inputs) -> OutputSchema:
        """The output's columns; templates and worker processes are made for the columns that there are."""
        if self._schema is not None and self._pool is not None and self._seen == inputs.columns:
            return self._schema
        template, self._schema = checked(self._config, inputs)
        if self._pool is None or self._seen is None or self._seen.names != inputs.columns.names:
            self.close()
            settings = effective_settings(self._config.generation, self._identity.generation_config)
            answered_by = answer_settings(self._config) | settings.fingerprint | self._identity.settings
            options = preparation_options(self._config, self._identity, template, fingerprint(answered_by))
            self._pool = preparation_pool(self._config, options, self._batcher)
        self._seen = inputs.columns
        return self._schema


def _table(batch: Mapping[str, np.ndarray[Any, Any]]) -> pa.Table:
    try:
        return pa.table({name: pa.array(values) for name, values in batch.items()})
    except (pa.ArrowException, TypeError) as problem:
        shapes = ", ".join(f"{name} {values.dtype}{list(values.shape)}" for name, values in batch.items())
        raise UsageError(
            f"a batch of {shapes} is no table ({problem}). Images are expected encoded, as bytes or as paths; "
            'batch_format="pyarrow" gives other columns as they are.'
        ) from problem

"""The ledger of one worker: every record of the shards it works on, until each shard is published.

    ledger.open(shard)        reads the journals of earlier attempts -> the keys that are answered already
    ledger.expect(row, keys)  a row is on its way through the pipeline; its columns are kept until it is answered
    ledger.record(answer)     a finished answer; journalled within sync_seconds, published with its shard's last one
    ledger.close()            what is finished is on disk, what is not is left for the next start

Journals are written by a thread of their own, so that a slow disk holds up the accelerator only when it fails.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import RunFailed
from pipeline.records import Answer, Fault, RecordKey, Row, Shard, Stage
from pipeline.tally import Tally
from pipeline.write.journal import Journal, read_journal
from pipeline.write.schema import OutputSchema, ShardSummary, journal_row
from pipeline.write.shard import publish_shard

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _OpenShard:
    shard: Shard
    num_expected: int
    batches: list[pa.RecordBatch]  # on disk, in a journal
    pending: list[dict[str, Any]] = field(default_factory=list)  # not yet
    seen: set[RecordKey] = field(default_factory=set)
    journal: Journal | None = None


@dataclass(slots=True)
class _ExpectedRow:
    shard: Shard
    columns: Mapping[str, Any]
    num_missing: int


class Ledger:
    """Records of the shards in work; see the module's docstring. `open` and `expect` may run in another thread.

    Args:
        attempt_id: unique to this start; part of every temporary name.
        constants: model_id, model_revision and run_id, the same in every record.
        numerics: what to say of engine, device and versions in a shard's footer; asked when a shard is published.
        tally: counts records as they are found in journals and as they come in.
    """

    def __init__(
        self,
        output_dir: Path,
        schema: OutputSchema,
        *,
        plan_id: str,
        attempt_id: str,
        prompt_names: Sequence[str],
        num_samples: int,
        constants: Mapping[str, str | None],
        numerics: Callable[[], Mapping[str, str]],
        tally: Tally,
        compression: str,
        sync_seconds: float,
    ) -> None:
        self._data_dir, self._work_dir = output_dir / "data", output_dir / "work"
        self._schema, self._journal_schema = schema, schema.journal
        self._plan_id, self._attempt_id = plan_id, attempt_id
        self._prompt_order = {name: number for number, name in enumerate(prompt_names)}
        self._records_per_row = len(prompt_names) * num_samples
        self._constants, self._numerics, self._tally = constants, numerics, tally
        self._compression = compression
        self._open: dict[int, _OpenShard] = {}
        self._rows: dict[int, _ExpectedRow] = {}
        self._lock = threading.Lock()
        self.num_published = 0  # shards that this worker finished, whether or not another was quicker
        self._failure: Exception | None = None
        self._closing = threading.Event()
        self._syncer = threading.Thread(target=self._sync_forever, args=(sync_seconds,), name="journal", daemon=True)
        self._syncer.start()

    def open(self, shard: Shard) -> frozenset[RecordKey]:
        """Take a shard in work; the keys that journals of earlier attempts answer already.

        A shard whose last record stands in a journal is published here.
        """
        current = _OpenShard(shard, (shard.stop - shard.start) * self._records_per_row, [])
        errors: Counter[str] = Counter()
        for path in self._journals(shard):
            for batch in read_journal(path, plan_id=self._plan_id, schema=self._journal_schema):
                fresh = [key not in current.seen for key in _keys(batch)]  # two attempts may have answered the same key
                batch = batch.filter(pa.array(fresh, pa.bool_()))
                current.batches.append(batch)
                current.seen.update(_keys(batch))
                errors.update(_errors(batch))
        answered = frozenset(current.seen)
        with self._lock:
            self._tally.resume(len(answered), errors)
            self._open[shard.number] = current
        self._publish_if_complete(current)
        return answered

    def expect(self, row: Row, keys: Sequence[RecordKey], shard: Shard) -> None:
        """Keep a row's columns until its answers are in."""
        with self._lock:
            self._rows[row.index] = _ExpectedRow(shard, row.columns, len(keys))

    def record(self, answer: Answer) -> None:
        """Put down a finished answer.

        Raises:
            RunFailed: a journal or a shard could not be written.
        """
        with self._lock:
            self._raise_failure()
            expected = self._rows[answer.key.row_index]
            current = self._open[expected.shard.number]
            assert answer.key not in current.seen, f"{answer.key} was answered twice"
            current.seen.add(answer.key)
            current.pending.append(journal_row(answer, expected.columns, self._schema.inputs, attempt=1))
            expected.num_missing -= 1
            if not expected.num_missing:
                del self._rows[answer.key.row_index]
            fault = answer.fault
            self._tally.add(f"{fault.stage}/{fault.kind}" if fault else None, answer.num_generated_tokens or 0)
        self._publish_if_complete(current)

    def _publish_if_complete(self, current: _OpenShard) -> None:
        with self._lock:
            if len(current.seen) < current.num_expected:
                return
            del self._open[current.shard.number]
        self._publish(current)

    def sync(self) -> None:
        """Bring every pending answer into a journal, on disk."""
        with self._lock:
            for current in self._open.values():
                if not current.pending:
                    continue
                batch = self._batch(current.pending)
                if current.journal is None:
                    path = self._work_dir / f"{current.shard.name}.{self._attempt_id}.journal"
                    current.journal = Journal(path, plan_id=self._plan_id, shard=current.shard.number)
                current.journal.append(batch)
                current.batches.append(batch)
                current.pending.clear()

    def close(self) -> None:
        """Stop the journal thread and put down what is finished."""
        self._closing.set()
        self._syncer.join()
        self._raise_failure()
        try:
            self.sync()
        except OSError as problem:
            raise self._unwritable(problem) from problem
        finally:
            for current in self._open.values():
                if current.journal:
                    current.journal.close()

    def _publish(self, current: _OpenShard) -> None:
        shard = current.shard
        batches = [*current.batches, self._batch(current.pending)] if current.pending else current.batches
        journal = self._sorted(pa.Table.from_batches(batches, self._journal_schema))
        errors = _errors(journal)
        summary = ShardSummary(
            plan_id=self._plan_id,
            shard=shard.number,
            num_rows=len(journal),
            num_errors=errors.total(),
            errors=dict(errors),
            num_generated_tokens=pc.sum(journal["num_generated_tokens"]).as_py() or 0,
            numerics=dict(self._numerics()),
        )
        won = publish_shard(
            self._schema.publish(journal, self._constants),
            summary,
            final=self._data_dir / f"{shard.name}.parquet",
            attempt_path=self._work_dir / f"{shard.name}.{self._attempt_id}.parquet",
            compression=self._compression,
        )
        with self._lock:
            self.num_published += 1
        if not won:
            log.info("%s was published by another worker meanwhile; this copy is discarded", shard.name)
        if current.journal:
            current.journal.close()
        for path in self._journals(shard):
            path.unlink(missing_ok=True)

    def _sorted(self, journal: pa.Table) -> pa.Table:
        order = pa.array([self._prompt_order[name] for name in journal["prompt_name"].to_pylist()], pa.int32())
        keys = pa.table({"row": journal["row_index"], "prompt": order, "sample": journal["sample_index"]})
        return journal.take(pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names]))

    def _batch(self, rows: list[dict[str, Any]]) -> pa.RecordBatch:
        try:
            return pa.RecordBatch.from_pylist(rows, self._journal_schema)
        except (pa.ArrowException, UnicodeEncodeError, ValueError, TypeError, OverflowError):
            # One value does not fit its column (a lone surrogate, a type the scan never saw): find its row.
            return pa.Table.from_batches([self._single(row) for row in rows]).combine_chunks().to_batches()[0]

    def _single(self, row: dict[str, Any]) -> pa.RecordBatch:
        cleaned = {name: _printable(value) if isinstance(value, str) else value for name, value in row.items()}
        if cleaned != row:
            cleaned["warnings"] = [*row["warnings"], "text cleaned: lone surrogates replaced"]
        try:
            return pa.RecordBatch.from_pylist([cleaned], self._journal_schema)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as problem:
            fault = Fault(Stage.WRITE, type(problem).__name__, _printable(str(problem)))
            key = RecordKey(row["row_index"], row["prompt_name"], row["sample_index"])
            bare = journal_row(Answer(key, cleaned["id"], fault=fault), {}, self._schema.inputs, row["attempt"])
            return pa.RecordBatch.from_pylist([bare], self._journal_schema)

    def _journals(self, shard: Shard) -> list[Path]:
        return sorted(self._work_dir.glob(f"{shard.name}.*.journal"))

    def _sync_forever(self, sync_seconds: float) -> None:
        while not self._closing.wait(sync_seconds):
            try:
                self.sync()
            except Exception as problem:  # handed to the next record() or close(): a thread has no caller
                self._failure = problem
                return

    def _raise_failure(self) -> None:
        if self._failure is not None:
            problem, self._failure = self._failure, None
            raise self._unwritable(problem) if isinstance(problem, OSError) else problem

    def _unwritable(self, problem: OSError) -> RunFailed:
        return RunFailed(
            f"the journals in {self._work_dir} cannot be written: {problem.strerror or problem}. What was synced "
            "before is safe; make room or restore the folder and run the same command again."
        )


def _keys(batch: pa.RecordBatch) -> list[RecordKey]:
    columns = (batch.column(name).to_pylist() for name in ("row_index", "prompt_name", "sample_index"))
    return [RecordKey(*values) for values in zip(*columns, strict=True)]


def _errors(rows: pa.RecordBatch | pa.Table) -> Counter[str]:
    """Error records by "stage/type"."""
    pairs = zip(rows["error_stage"].to_pylist(), rows["error_type"].to_pylist(), strict=True)
    return Counter(f"{stage}/{kind}" for stage, kind in pairs if stage is not None)


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()

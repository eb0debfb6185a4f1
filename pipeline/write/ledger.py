"""The ledger of one worker: every record of the shards it works on, until each shard is published.

    ledger.open(shard)        reads the journals of earlier attempts -> the keys that still need an answer
    ledger.expect(row, keys)  a row is on its way through the pipeline; its columns are kept until it is answered
    ledger.record(answer)     a finished answer; journalled within sync_seconds, published with its shard's last one
    ledger.close()            what is finished is on disk, what is not is left for the next start

Journals are written by a thread of their own, so that a slow disk holds up the accelerator only when it fails.

Two locks: `_lock` guards what is in memory and is held for moments; `_disk` is held by whoever writes, so that a record
can be put down while a journal waits for its disk. Who needs both takes `_disk` first.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import RunFailed
from pipeline.records import Answer, RecordKey, Row, Shard
from pipeline.tally import Tally
from pipeline.write.columns import journal_batch
from pipeline.write.crash_point import crash_point
from pipeline.write.file import sync_directory
from pipeline.write.goal import Goal, Wanted
from pipeline.write.journal import Journal, JournalHeader, read_journal
from pipeline.write.schema import journal_row
from pipeline.write.suspects import NOBODY, Suspects, Taken, read_suspects, taken_files

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _OpenShard:
    shard: Shard
    wanted: Wanted
    taken: Taken
    suspects: Suspects = NOBODY
    batches: list[pa.RecordBatch] = field(default_factory=list)  # on disk, in a journal
    pending: list[dict[str, Any]] = field(default_factory=list)  # not yet
    seen: set[RecordKey] = field(default_factory=set)
    journal: Journal | None = None

    def close_journal(self) -> None:
        if self.journal is not None:
            self.journal.close()
            self.journal = None


@dataclass(slots=True)
class _ExpectedRow:
    shard: Shard
    columns: Mapping[str, Any]
    num_missing: int


class Ledger:
    """Records of the shards in work; see the module's docstring. `open` and `expect` may run in another thread.

    Args:
        goal: what is wanted of the shards.
        attempt_id: unique to this start; part of every temporary name.
        numerics: what to say of engine, device and versions in a shard's footer; asked when a shard is published.
        tally: counts records as they are found in journals and as they come in.
    """

    def __init__(
        self,
        output_dir: Path,
        goal: Goal,
        *,
        attempt_id: str,
        numerics: Callable[[], Mapping[str, str]],
        tally: Tally,
        sync_seconds: float,
    ) -> None:
        self._work_dir = output_dir / "work"
        self._goal, self._schema, self._journal_schema = goal, goal.schema, goal.schema.journal
        self._attempt_id, self._numerics, self._tally = attempt_id, numerics, tally
        self._open: dict[int, _OpenShard] = {}
        self._rows: dict[int, _ExpectedRow] = {}
        self._lock, self._disk = threading.Lock(), threading.Lock()
        self._journal_numbers = itertools.count()
        self.num_published = 0  # shards that this worker finished, whether or not another was quicker
        self._failure: Exception | None = None
        self._closing = threading.Event()
        self._syncer = threading.Thread(target=self._sync_forever, args=(sync_seconds,), name="journal", daemon=True)
        self._syncer.start()

    def open(self, shard: Shard) -> frozenset[RecordKey]:
        """Take a shard in work; the keys that still need an answer.

        The others stand in journals of earlier attempts, or another worker published the whole shard meanwhile. A shard
        whose last record stands in a journal is published here.

        Raises:
            RunFailed: the shard could not be published, or what is in its place is no shard.
        """
        wanted = self._goal.wanted(shard)
        current = _OpenShard(shard, wanted, Taken(self._work_dir, wanted.stem, self._attempt_id))
        errors: Counter[str] = Counter(wanted.settled_errors)
        for path in self._journals(wanted):
            for batch in read_journal(path, self._header(current), schema=self._journal_schema):
                # Two attempts may have answered the same key.
                fresh = [key in wanted.attempts and key not in current.seen for key in _keys(batch)]
                batch = batch.filter(pa.array(fresh, pa.bool_()))
                current.batches.append(batch)
                current.seen.update(_keys(batch))
                errors.update(_errors(batch))
        # Asked last: a worker that publishes removes the journals afterwards, so what is missing there is seen here.
        if summary := self._goal.reached(shard):
            with self._lock:
                self._tally.resume(summary.num_rows, summary.errors)
                self.num_published += 1
            return frozenset()
        with self._lock:
            self._tally.resume(wanted.num_settled + len(current.seen), errors)
            self._open[shard.number] = current
        missing = wanted.attempts.keys() - current.seen
        current.suspects = read_suspects(self._work_dir, wanted.stem, {key.row_index for key in missing})
        self._publish_if_complete(current)
        return frozenset(missing)

    def is_open(self, shard: Shard) -> bool:
        """Whether a shard is in work: taken, and not yet published."""
        with self._lock:
            return shard.number in self._open

    def suspects(self, shard: Shard) -> Suspects:
        """Rows of a shard in work that may have ended earlier attempts; they are to be asked alone."""
        with self._lock:
            return self._open[shard.number].suspects

    def taken(self, key: RecordKey) -> None:
        """A sample is given to the engine: should the process end now, this row was under way.

        Raises:
            RunFailed: that could not be noted.
        """
        with self._lock:
            current = self._open[self._rows[key.row_index].shard.number]
            alone = (key.row_index,) in current.suspects.groups
            try:
                current.taken.add(key.row_index, alone=alone)
            except OSError as problem:
                if self._goal.reached(current.shard):
                    return  # by another worker, which has cleared work/ away: nobody will ask who was at it
                raise self._unwritable(problem) from problem

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
            attempt = current.wanted.attempts[answer.key]
            current.pending.append(journal_row(answer, expected.columns, self._schema, attempt))
            expected.num_missing -= 1
            if not expected.num_missing:
                del self._rows[answer.key.row_index]
            self._tally.add(answer)
        self._publish_if_complete(current)

    def sync(self) -> None:
        """Bring every pending answer into a journal, on disk.

        Raises:
            RunFailed: a journal could not be written.
        """
        with self._disk:
            with self._lock:
                in_work = list(self._open.values())
            for current in in_work:
                self._journal_pending(current)

    def close(self) -> None:
        """Stop the journal thread and put down what is finished.

        Raises:
            RunFailed: a journal could not be written.
        """
        self._closing.set()
        self._syncer.join()
        try:
            self.sync()
            self._raise_failure()
        finally:
            with self._disk, self._lock:
                for current in self._open.values():
                    current.close_journal()
                    current.taken.close()

    def _journal_pending(self, current: _OpenShard) -> None:
        with self._lock:
            rows = list(current.pending)  # stay pending until the disk has them
        if not rows:
            return
        batch, unfit = journal_batch(rows, self._schema)
        try:
            if current.journal is None:
                name = f"{current.wanted.stem}.{self._attempt_id}-{next(self._journal_numbers)}.journal"
                current.journal = Journal(self._work_dir / name, self._header(current))
            current.journal.append(batch)
        except OSError as problem:
            current.close_journal()  # it may end in half a frame: a later try starts another file
            if self._goal.reached(current.shard):
                return  # by another worker, which has cleared work/ away: nothing is lost
            raise self._unwritable(problem) from problem
        with self._lock:
            current.batches.append(batch)
            del current.pending[: len(rows)]
            self._tally.errors.update(unfit)

    def _publish_if_complete(self, current: _OpenShard) -> None:
        with self._lock:
            if len(current.seen) < len(current.wanted.attempts):
                return
        with self._disk:
            # Into the journal first: whatever becomes of the publication, the answers are on disk.
            self._journal_pending(current)
            self._publish(current)
            with self._lock:
                del self._open[current.shard.number]
                self.num_published += 1
            current.close_journal()
            current.taken.close()
            # Also those of other workers at this shard: they have nothing to add to it.
            crash_point("shard_settled")
            for path in (*self._journals(current.wanted), *taken_files(self._work_dir, current.wanted.stem)):
                path.unlink(missing_ok=True)
                crash_point("journal_removed")

    def _publish(self, current: _OpenShard) -> None:
        if current.pending:  # not journalled because another worker was quicker
            sync_directory(self._work_dir.parent / "data")  # its file keeps its name before our journals go
            return
        won = self._goal.publish(
            current.shard,
            current.wanted,
            pa.Table.from_batches(current.batches, self._journal_schema),
            numerics=dict(self._numerics()),
            attempt_path=self._work_dir / f"{current.wanted.stem}.{self._attempt_id}.parquet",
        )
        if not won:
            log.info("%s was published by another worker meanwhile; this copy is discarded", current.shard.name)

    def _header(self, current: _OpenShard) -> JournalHeader:
        return JournalHeader(self._goal.plan_id, current.shard.number, current.wanted.generation)

    def _unwritable(self, problem: OSError) -> RunFailed:
        return RunFailed(
            f"the journals in {self._work_dir} cannot be written: {problem.strerror or problem}. What was synced "
            "before is safe; make room or restore the folder and run the same command again."
        )

    def _journals(self, wanted: Wanted) -> list[Path]:
        return sorted(path for path in self._work_dir.glob(f"{wanted.stem}.*.journal") if path.is_file())

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
            raise problem


def _keys(batch: pa.RecordBatch) -> list[RecordKey]:
    columns = (batch.column(name).to_pylist() for name in ("row_index", "prompt_name", "sample_index"))
    return [RecordKey(*values) for values in zip(*columns, strict=True)]


def _errors(rows: pa.RecordBatch) -> Counter[str]:
    """Error records by "stage/type"."""
    pairs = zip(rows["error_stage"].to_pylist(), rows["error_type"].to_pylist(), strict=True)
    return Counter(f"{stage}/{kind}" for stage, kind in pairs if stage is not None)

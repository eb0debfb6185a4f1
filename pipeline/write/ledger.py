"""The ledger of one worker: every record of the shards it works on, until each shard is published.

    ledger.open(shard)        reads the journals of earlier attempts -> the keys that still need an answer
    ledger.expect(row, keys)  a row is on its way through the pipeline; its columns are kept until it is answered
    ledger.record(answer)     a finished answer; journalled within sync_seconds, published with its shard's last one
    ledger.close()            what is finished is on disk, what is not is left for the next start

Journals are written by a thread of their own, so that a slow disk holds up the accelerator only when it fails.

Two workers may be at one shard: towards the end of a run one that has nothing left to do helps another, from the
shard's end (pipeline/feed.py). Each takes over what the other has in its journals, whenever it writes its own, so that
they meet somewhere; whoever has all answers first publishes, and the other one drops the shard.

Two locks: `_lock` guards what is in memory and is held for moments; `_disk` is held by whoever writes, so that a record
can be put down while a journal waits for its disk. Who needs both takes `_disk` first.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import RunFailed
from pipeline.records import Answer, RecordKey, Row, Shard
from pipeline.tally import Tally
from pipeline.write.claim import HELP, Claim, claim_of
from pipeline.write.columns import journal_batch
from pipeline.write.crash_point import crash_point
from pipeline.write.file import Place, matching, sync_directory
from pipeline.write.goal import Goal, Wanted
from pipeline.write.journal import JournalHeader, new_journal, read_journal
from pipeline.write.open_shard import OpenShard
from pipeline.write.schema import ShardSummary
from pipeline.write.suspects import Suspects, Taken, read_suspects, taken_files

log = logging.getLogger(__name__)


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
        output_dir: Place,
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
        self._open: dict[int, OpenShard] = {}
        self._rows: dict[int, _ExpectedRow] = {}
        self._lock, self._disk = threading.Lock(), threading.Lock()
        self._journal_numbers = itertools.count()
        self.num_published = 0  # shards that this worker finished, whether or not another was quicker
        self._failure: Exception | None = None
        self._closing = threading.Event()
        self._syncer = threading.Thread(target=self._sync_forever, args=(sync_seconds,), name="journal", daemon=True)
        self._syncer.start()

    def open(self, shard: Shard, *, has_company: bool = False) -> frozenset[RecordKey]:
        """Take a shard in work; the keys that still need an answer.

        The others stand in journals of earlier attempts, or another worker published the whole shard meanwhile. A shard
        whose last record stands in a journal is published here.

        has_company: another worker is at it and goes on.

        Raises:
            RunFailed: the shard could not be published, or what is in its place is no shard.
        """
        wanted = self._goal.wanted(shard)
        current = OpenShard(shard, wanted, Taken(self._work_dir, wanted.stem, self._attempt_id), has_company)
        current.errors.update(wanted.settled_errors)
        with self._lock:
            self._tally.resume(wanted.num_settled, wanted.settled_errors)
        self._take_over(current)
        # Asked last: a worker that publishes removes the journals afterwards, so what is missing there is seen here.
        if summary := self._goal.reached(shard):
            with self._lock:
                self._tally.resume(*current.rest(summary))
                self.num_published += 1
            return frozenset()
        with self._lock:
            assert shard.number not in self._open, f"{shard.name} is in work here already"
            self._open[shard.number] = current
        missing = wanted.attempts.keys() - current.seen
        current.suspects = read_suspects(self._work_dir, wanted.stem, {key.row_index for key in missing})
        self._publish_if_complete(current)
        return frozenset(missing)

    def num_attempts(self, shard: Shard) -> int:
        """How many have given rows of a shard to an engine and not ended in good order since, dead or alive."""
        return len(taken_files(self._work_dir, self._goal.stem(shard)))

    def is_open(self, shard: Shard) -> bool:
        """Whether a shard is in work: taken, and not yet published."""
        with self._lock:
            return shard.number in self._open

    def suspects(self, shard: Shard) -> Suspects:
        """Rows of a shard in work that may have ended earlier attempts; they are to be asked alone."""
        with self._lock:
            return self._open[shard.number].suspects

    def lacking(self, shard: Shard, keys: Sequence[RecordKey]) -> tuple[RecordKey, ...]:
        """Those of the keys that nobody has answered yet, as far as is known here."""
        with self._lock:
            current = self._open.get(shard.number)
            return tuple(key for key in keys if current is not None and key not in current.seen)

    def taken(self, key: RecordKey) -> bool:
        """A sample is given to the engine: should the process end now, this row was under way.

        Returns:
            False where another worker has answered it meanwhile: then it is not to be asked.

        Raises:
            RunFailed: that could not be noted.
        """
        with self._lock:
            current = self._in_work(key)
            if current is None or key in current.seen:
                self._row_has(key)
                return False
            alone = (key.row_index,) in current.suspects.groups
            rows = self._rows.items()
            on_their_way = (index for index, row in rows if row.shard.number == current.shard.number)
            try:
                current.taken.add(key.row_index, alone=alone, on_their_way=on_their_way)
            except OSError as problem:
                if not self._goal.reached(current.shard):
                    raise self._unwritable(problem) from problem
                # By another worker, which has cleared work/ away: nobody will ask who was at it.
            return True

    def expect(self, row: Row, keys: Sequence[RecordKey], shard: Shard) -> None:
        """Keep a row's columns until its answers are in."""
        with self._lock:
            self._rows[row.index] = _ExpectedRow(shard, row.columns, len(keys))

    def record(self, answer: Answer) -> None:
        """Put down a finished answer; one that another worker has given meanwhile is dropped.

        Raises:
            RunFailed: a journal or a shard could not be written.
        """
        with self._lock:
            self._raise_failure()
            current = self._in_work(answer.key)
            columns = self._row_has(answer.key)
            if current is None or answer.key in current.by_others:
                return
            current.add(answer, columns, self._schema)
            self._tally.add(answer)
        self._publish_if_complete(current)

    def _in_work(self, key: RecordKey) -> OpenShard | None:
        """The shard of a key; None once another worker has published it. The lock is held."""
        expected = self._rows.get(key.row_index)
        return self._open.get(expected.shard.number) if expected is not None else None

    def _row_has(self, key: RecordKey) -> Mapping[str, Any]:
        """One key less is awaited of its row, whose columns are kept until none is. The lock is held."""
        expected = self._rows.get(key.row_index)
        if expected is None:
            return {}
        expected.num_missing -= 1
        if not expected.num_missing:
            del self._rows[key.row_index]
        return expected.columns

    def sync(self) -> None:
        """Bring every pending answer into a journal, on disk; take over what another worker at the same shard has.

        Raises:
            RunFailed: a journal or a shard could not be written.
        """
        with self._disk:
            with self._lock:
                in_work = list(self._open.values())
            for current in in_work:
                self._journal_pending(current)
            met = [current for current in in_work if self._meet(current)]
        for current in met:
            self._publish_if_complete(current)

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

    def _journal_pending(self, current: OpenShard) -> None:
        with self._lock:
            rows = list(current.pending)  # stay pending until the disk has them
        if not rows:
            return
        batch, unfit = journal_batch(rows, self._schema)
        try:
            if current.journal is None:
                name = f"{current.wanted.stem}.{self._attempt_id}-{next(self._journal_numbers)}.journal"
                current.journal = new_journal(self._work_dir / name, self._header(current))
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

    def _meet(self, current: OpenShard) -> bool:
        """Take over what others have done of a shard, if somebody else is at it; whether there was something."""
        name = current.shard.name
        current.has_company = current.has_company or claim_of(self._work_dir, f"{name}{HELP}") != Claim()
        if not current.has_company:
            return False
        found = self._take_over(current)
        if summary := self._goal.reached(current.shard):
            with self._lock:
                self._drop(current, summary)
            return False
        return found

    def _take_over(self, current: OpenShard) -> bool:
        """The answers in journals of others, and of earlier starts; whether there was one that was lacking."""
        before = len(current.seen)
        for path in self._journals(current.wanted):
            try:
                size = path.stat().st_size
            except FileNotFoundError:  # its shard has just been published
                continue
            if path.name.startswith(f"{current.wanted.stem}.{self._attempt_id}-"):
                continue
            if current.sizes_read.get(path.name) == size:
                continue
            current.sizes_read[path.name] = size
            for batch in read_journal(path, self._header(current), schema=self._journal_schema):
                with self._lock:
                    self._tally.resume(*current.take_over(batch))
        return len(current.seen) > before

    def _drop(self, current: OpenShard, summary: ShardSummary) -> None:
        """Another worker has published the shard: what is on its way for it is awaited no more. The lock is held."""
        log.info("%s was published by another worker; what was under way for it is dropped", current.shard.name)
        self._tally.resume(*current.rest(summary))
        del self._open[current.shard.number]
        self._rows = {index: row for index, row in self._rows.items() if row.shard.number != current.shard.number}
        current.close_journal()
        current.taken.close()

    def _publish_if_complete(self, current: OpenShard) -> None:
        with self._lock:
            if not current.is_complete:
                return
        with self._disk:
            with self._lock:
                if self._open.get(current.shard.number) is not current:
                    return  # by another thread
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

    def _publish(self, current: OpenShard) -> None:
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

    def _header(self, current: OpenShard) -> JournalHeader:
        return JournalHeader(self._goal.plan_id, current.shard.number, current.wanted.generation)

    def _unwritable(self, problem: OSError) -> RunFailed:
        return RunFailed(
            f"the journals in {self._work_dir} cannot be written: {problem.strerror or problem}. What was synced "
            "before is safe; make room or restore the folder and run the same command again."
        )

    def _journals(self, wanted: Wanted) -> list[Place]:
        return [path for path in matching(self._work_dir, f"{wanted.stem}.*.journal") if path.is_file()]

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

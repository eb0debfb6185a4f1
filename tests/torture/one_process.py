"""Workers of one job inside the test's own process, each stepped by hand: what a machine of rules may interleave.

Plan, agenda, claims, feed, ledger, status and manifest are the program's own; only the model is not there, and the
worker processes that decode are not. A worker stands still between two steps, and a kill just forgets it: what it had
open stays as it is, what it had not written is gone, and nothing is tidied up on the way out.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_run import COLUMNS, FAULT, SETTINGS, answer, inputs, row

from pipeline import feed as feed_module
from pipeline.agenda import Agenda
from pipeline.feed import Feed
from pipeline.manifest import write_manifest
from pipeline.plan import Plan, read_inputs, read_plan
from pipeline.planning import Resume, make_folders, open_plan
from pipeline.preparation import Task
from pipeline.records import Fault, RecordKey, Row, Shard
from pipeline.status import read_status
from pipeline.tally import Tally
from pipeline.write import claim, crash_point
from pipeline.write.claim import Claim, Claims
from pipeline.write.journal import Journal
from pipeline.write.ledger import Ledger
from pipeline.write.schema import WriteConfig, output_schema

NUM_BROKEN = 5  # every so many rows, one that has no answer


class Killed(BaseException):
    """The process of a worker has ended at this instant."""


class Machine:
    """The computer under the workers: who is alive, what the file system answers, and where somebody dies."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.alive: set[int] = set()
        self.kept: set[RecordKey] = set()  # answers that a disk has confirmed
        self.loses_reply = False  # the next hard link is made, and reported as refused because it was there
        self.rival: Callable[[Path], None] | None = None  # publishes the next shard right before its worker does
        self._dying = False
        self._link, self._unlink, self._append = os.link, os.unlink, Journal.append
        patch.setattr(os, "link", self._linked)
        patch.setattr(os, "unlink", lambda *args, **more: None if self._dying else self._unlink(*args, **more))
        patch.setattr(os, "fsync", lambda _: None)  # no power cut here
        patch.setattr(Journal, "append", lambda journal, rows: self._appended(journal, rows))
        patch.setattr(claim, "is_alive", lambda pid: pid in self.alive)
        patch.setattr(crash_point, "_die", self._die)
        patch.setattr(feed_module, "_POLL_SECONDS", 0.0)
        patch.setattr(feed_module, "_PATIENCE_SECONDS", 0.0)  # whoever is idle helps

    def run(self, step: Callable[[], object], crash_at: str = "", times: int = 1) -> None:
        """One step of a worker.

        Raises:
            Killed: it got to that point.
        """
        armed = crash_point._armed
        armed.name, armed.left = crash_at, times
        try:
            step()
        finally:
            armed.name, self._dying = "", False

    def _die(self) -> None:
        self._dying = True  # nothing that the unwinding tidies up may have an effect
        raise Killed

    def _linked(self, source: Any, target: Any, **more: Any) -> None:
        if self.rival is not None and Path(target).parent.name == "data":
            rival, self.rival = self.rival, None
            rival(Path(target))
        self._link(source, target, **more)
        if self.loses_reply:
            self.loses_reply = False
            raise FileExistsError(errno.EEXIST, "the link was made, its confirmation was lost", str(target))

    def _appended(self, journal: Journal, rows: Any) -> None:
        self._append(journal, rows)
        columns = (rows[name].to_pylist() for name in RecordKey._fields)
        self.kept.update(RecordKey(*values) for values in zip(*columns, strict=True))


class Job:
    """One output folder, its source, and what is right about it."""

    def __init__(self, folder: Path, machine: Machine, num_rows: int, shard_rows: int, num_prompts: int) -> None:
        self.folder, self.output, self.machine = folder, folder / "out", machine
        self.num_rows, self.shard_rows = num_rows, shard_rows
        self.prompt_names = tuple(f"p{number}" for number in range(num_prompts))
        self.made: Counter[RecordKey] = Counter()
        self.condemned: set[int] = set()  # rows that were alone at work when a process ended
        self._seen: dict[str, bytes] = {}  # shards that a reader has seen

    def plan(self, resume: Resume) -> Plan:
        return open_plan(
            self.output,
            SETTINGS,
            scan=lambda: inputs(self.num_rows),
            max_rows=None,
            shard_rows=self.shard_rows,
            prompt_names=self.prompt_names,
            num_samples=2,
            resume=resume,
        )

    def fault(self, row_index: int) -> Fault | None:
        return FAULT if row_index % NUM_BROKEN == NUM_BROKEN - 1 else None

    def check_always(self) -> Plan | None:
        """What a reader may see at any moment: whole shards with the right answers, no key twice, and never less."""
        assert {path.name for path in self.folder.iterdir()} <= {"out"}
        plan, data = read_plan(self.output), self.output / "data"
        files = {path.name: path for path in data.iterdir()} if data.exists() else {}
        assert self._seen.keys() <= files.keys(), "a shard is gone"
        for name, path in sorted(files.items()):
            content = path.read_bytes()
            if name not in self._seen:
                assert plan is not None, "a shard without a plan"
                self._check_shard(plan, path)
                self._seen[name] = content
            assert self._seen[name] == content, f"{name} has changed"
        return plan

    def _check_shard(self, plan: Plan, path: Path) -> None:
        shard = plan.shard(int(path.stem.partition("-")[2]))
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            rows = file.read().to_pylist()
        assert [RecordKey(*(one[name] for name in RecordKey._fields)) for one in rows] == list(self.keys(shard))
        for one in rows:
            key = RecordKey(*(one[name] for name in RecordKey._fields))
            assert one["run_id"] == plan.plan_id
            if one["error_type"] == "ProcessEnded":
                assert key.row_index in self.condemned, f"{key} is blamed for deaths that it was not alone at"
            elif fault := self.fault(key.row_index):
                assert (one["error_stage"], one["error_type"]) == (fault.stage, fault.kind)
            else:
                assert one["response"] == answer(key).response, f"{key}: a wrong answer"

    def keys(self, shard: Shard) -> Iterator[RecordKey]:
        for index in range(shard.start, shard.stop):
            for name in self.prompt_names:
                yield from (RecordKey(index, name, sample) for sample in range(2))

    def ledger(self, plan: Plan, attempt_id: str) -> _LedgerOfJob:
        return _LedgerOfJob(self, plan, attempt_id)


class _LedgerOfJob(Ledger):
    """The program's ledger, which is watched: no answer that a disk has may be asked for again."""

    def __init__(self, job: Job, plan: Plan, attempt_id: str) -> None:
        self.goal = Agenda(job.output, plan, None).goal(
            output_schema(WriteConfig(), COLUMNS),
            constants={"model_id": "demo", "model_revision": None, "run_id": plan.plan_id},
            compression="zstd",
        )
        self._machine = job.machine
        super().__init__(
            job.output,
            self.goal,
            attempt_id=attempt_id,
            numerics=lambda: {"engine": attempt_id},  # so that no two files of a shard are the same
            tally=Tally(plan.num_records),
            sync_seconds=3600,
        )

    def open(self, shard: Shard, *, has_company: bool = False) -> frozenset[RecordKey]:
        kept = set(self._machine.kept)
        missing = super().open(shard, has_company=has_company)
        assert not missing & kept, "what a journal has is asked for again"
        return missing

    def forget(self) -> None:
        """What the kernel does for a dead process, and nothing else."""
        self._closing.set()
        self._syncer.join()
        for current in self._open.values():
            if current.journal is not None:
                current.journal._file.close()
            if current.taken._file is not None:
                os.close(current.taken._file)
                current.taken._file = None

    def torn(self, num_bytes: Callable[[int], int]) -> None:
        """Dies in the middle of a write: of what one journal gets now, so many bytes are there."""
        kept = set(self._machine.kept)
        journals = sorted(self._work_dir.glob("*.journal"))
        sizes = {path: path.stat().st_size for path in journals}
        with suppress(OSError):
            self.sync()
        for path in sorted(self._work_dir.glob(f"*.{self._attempt_id}-*.journal")):
            before, after = sizes.get(path, 0), path.stat().st_size
            if before < after:
                os.truncate(path, before + num_bytes(after - before - 1))
        self._machine.kept.intersection_update(kept)


class _Rows:
    """The rows of any plan of the job."""

    def __len__(self) -> int:
        return 1 << 30

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        return (row(index) for index in range(start, stop))


class Worker:
    """One start of the job. host: of the claims; how many rows it has in a batch, and fetches ahead of one."""

    def __init__(self, job: Job, number: int, *, host: str, batch_rows: int, rows_ahead: int, resume: Resume) -> None:
        self.job, self.name, self.host, self.resume = job, f"worker{number}", host, resume
        self._pid, self._batch_rows, self._rows_ahead = number + 1, batch_rows, rows_ahead
        self.is_awake, self.has_ended, self.was_killed = True, False, False
        self.claims: Claims | None = None
        self.ledger: _LedgerOfJob | None = None
        self._life = self._run()
        job.machine.alive.add(self._pid)

    def step(self, crash_at: str = "", times: int = 1) -> None:
        """Go on to the next standstill; at the end of the work, the worker has ended."""
        try:
            self.job.machine.run(lambda: next(self._life), crash_at, times)
        except StopIteration:
            self._leave()
        except Killed:
            self.kill()

    def beat(self) -> None:
        if self.claims is not None and self.is_awake and not self.has_ended:
            self.claims.beat()

    def kill(self, torn: Callable[[int], int] | None = None) -> None:
        """SIGKILL; torn: in the middle of a write of a journal."""
        self.was_killed = True
        if self.ledger is not None:
            if torn is not None:
                self.ledger.torn(torn)
            self.ledger.forget()
            for path in (self.job.output / "work").glob(f"*.{self.name}.taken"):
                last = int.from_bytes(path.read_bytes()[-8:], "little", signed=True)
                self.job.condemned |= {-1 - last} if last < 0 else set()
        self._leave()

    def _leave(self) -> None:
        self.has_ended = True
        self.job.machine.alive.discard(self._pid)

    def _run(self) -> Iterator[None]:
        job = self.job
        plan = job.plan(self.resume)
        yield
        agenda = Agenda(job.output, plan, None)
        if todo := agenda.shards():
            make_folders(job.output)
            read_inputs(job.output, plan)
            self.ledger = job.ledger(plan, self.name)
            self.claims = Claims(job.output / "work", self.name)
            self.claims._own = Claim(self.name, self.host, self._pid)
            feed = Feed(plan, _Rows(), self.ledger.goal, self.ledger, self.claims)
            for tasks in feed.streams(todo):
                yield from self._answered(tasks, self.ledger)
                yield
            assert feed.unfinished(todo) == []
            self.ledger.close()
            self.claims.close()
        yield
        write_manifest(job.output, read_status(job.output))

    def _answered(self, tasks: Iterator[Task], ledger: Ledger) -> Iterator[None]:
        """As worker processes and an engine do: some rows ahead, batches, answers in another order."""
        ahead: deque[Task] = deque()
        while True:
            while len(ahead) < self._rows_ahead and (task := next(tasks, None)):
                ahead.append(task)
                yield
            if not ahead:
                return
            batch: list[RecordKey] = []
            while ahead and len(batch) < self._batch_rows:
                task = ahead.popleft()
                fault = task.row.fault or self.job.fault(task.row.index)
                for key in task.keys:
                    if fault:
                        ledger.record(answer(key, fault=fault))
                    elif ledger.taken(key):
                        batch.append(key)
                yield
            for key in reversed(batch):
                self.job.made[key] += 1
                ledger.record(answer(key))
                yield

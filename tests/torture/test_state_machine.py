"""Any interleaving of workers, kills, clocks and lost replies that hypothesis can think of, in one process."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
from faultbox import Found
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from one_process import Job, Machine, Worker
from small_run import tree

from pipeline.agenda import Agenda
from pipeline.planning import Resume
from pipeline.status import read_status, status_lines
from pipeline.write.crash_point import CRASH_POINTS

POINTS = sorted(name for name in CRASH_POINTS if not name.startswith(("generation_", "overwrite_")))
CHOICE = st.integers(0, 11)  # of one of the workers: by its remainder
NUM_STEPS = st.integers(0, 25)
RESUME = st.sampled_from([Resume.auto, Resume.extend])
HOSTS = ("here", "there")
MOST_STEPS = 5000
MOST_WORKERS = 5


class JobOfSeveralWorkers(RuleBasedStateMachine):
    """Start, step, stop, wake and kill workers; add rows; move the clock; lose a reply; lose a race; look."""

    folder: ClassVar[Path]
    found: ClassVar[Found]

    @initialize(
        num_rows=st.integers(1, 12),
        shard_rows=st.integers(1, 4),
        num_prompts=st.integers(1, 2),
        resume=RESUME,
        has_survivors=st.booleans(),
    )
    def plan_job(self, num_rows: int, shard_rows: int, num_prompts: int, resume: Resume, has_survivors: bool) -> None:
        self.has_survivors = has_survivors
        self.patches = pytest.MonkeyPatch()
        self.machine = Machine(self.patches)
        self.job = Job(Path(tempfile.mkdtemp(dir=self.folder)), self.machine, num_rows, shard_rows, num_prompts)
        self.workers: list[Worker] = []
        self.num_started = 0
        for host in HOSTS:
            self._start(host, 2, 3, resume)

    @property
    def living(self) -> list[Worker]:
        return [worker for worker in self.workers if not worker.has_ended]

    @property
    def awake(self) -> list[Worker]:
        return [worker for worker in self.living if worker.is_awake]

    def _start(self, host: str, batch_rows: int, rows_ahead: int, resume: Resume) -> None:
        number = self.num_started
        self.num_started += 1
        self.workers.append(
            Worker(self.job, number, host=host, batch_rows=batch_rows, rows_ahead=rows_ahead, resume=resume)
        )

    def _go_on(self, worker: Worker, num_steps: int, crash_at: str = "", times: int = 1) -> None:
        for _ in range(num_steps):
            if not worker.has_ended:
                worker.step(crash_at, times)

    @precondition(lambda self: len(self.living) < MOST_WORKERS)
    @rule(
        host=st.sampled_from(HOSTS),
        batch_rows=st.integers(1, 4),
        rows_ahead=st.integers(1, 5),
        resume=RESUME,
        num_steps=NUM_STEPS,
    )
    def start_worker(self, host: str, batch_rows: int, rows_ahead: int, resume: Resume, num_steps: int) -> None:
        self._start(host, batch_rows, rows_ahead, resume)
        self._go_on(self.workers[-1], num_steps)

    @precondition(lambda self: self.awake)
    @rule(which=CHOICE, num_steps=NUM_STEPS)
    def step_worker(self, which: int, num_steps: int) -> None:
        self._go_on(self.awake[which % len(self.awake)], num_steps)

    @precondition(lambda self: self.awake)
    @rule(which=CHOICE, num_steps=NUM_STEPS)
    def sync_journal(self, which: int, num_steps: int) -> None:
        worker = self.awake[which % len(self.awake)]
        self._go_on(worker, num_steps)
        if worker.ledger is not None and not worker.has_ended:
            worker.ledger.sync()

    @precondition(lambda self: self.living)
    @rule(which=CHOICE, cut=st.none() | st.floats(0, 1), num_steps=NUM_STEPS)
    def kill_worker(self, which: int, cut: float | None, num_steps: int) -> None:
        """Anywhere, or in the middle of a write of its journal; another one is started in its place."""
        worker = self.living[which % len(self.living)]
        self._go_on(worker, num_steps if worker.is_awake else 0)
        if not worker.has_ended:
            worker.kill(None if cut is None else lambda most: int(cut * most))
            self.found.num_faults += 1
        self._start(HOSTS[which % 2], 1 + which % 3, 1 + which % 4, Resume.auto)

    @precondition(lambda self: self.awake)
    @rule(which=CHOICE, point=st.sampled_from(POINTS), times=st.integers(1, 2), num_steps=st.integers(5, 30))
    def crash_worker(self, which: int, point: str, times: int, num_steps: int) -> None:
        """At one of the points that the program names, if it gets there."""
        worker = self.awake[which % len(self.awake)]
        self._go_on(worker, num_steps, point, times)
        self.found.num_faults += worker.was_killed
        self._start(HOSTS[which % 2], 1 + which % 3, 1 + which % 4, Resume.auto)

    @precondition(lambda self: len(self.awake) > 1)
    @rule(which=CHOICE, num_steps=NUM_STEPS, seconds=st.sampled_from([1, 61]))
    def stop_worker(self, which: int, num_steps: int, seconds: int) -> None:
        """SIGSTOP, for longer than a lease or not, while another works."""
        self.awake[which % len(self.awake)].is_awake = False
        self._advance(seconds)
        self._go_on(self.awake[which % len(self.awake)], num_steps)

    @precondition(lambda self: len(self.living) > len(self.awake))
    @rule(which=CHOICE, num_steps=NUM_STEPS)
    def wake_worker(self, which: int, num_steps: int) -> None:
        asleep = [worker for worker in self.living if not worker.is_awake]
        asleep[which % len(asleep)].is_awake = True
        self._go_on(asleep[which % len(asleep)], num_steps)

    @precondition(lambda self: self.awake)
    @rule(seconds=st.sampled_from([1, 50, 61, 3600, -3600]), which=CHOICE, num_steps=NUM_STEPS)
    def advance_clock(self, seconds: int, which: int, num_steps: int) -> None:
        self._advance(seconds)
        self._go_on(self.awake[which % len(self.awake)], num_steps)

    def _advance(self, seconds: int) -> None:
        """The clock of the file system, which claims go by: they are so much older, and who is awake renews them."""
        for path in (self.job.output / "work").glob("*.claim"):
            date = path.stat().st_mtime - seconds
            os.utime(path, (date, date))
        for worker in self.awake:
            worker.beat()

    @precondition(lambda self: (self.job.output / "plan/inputs.parquet").exists() and self.job.num_rows < 30)
    @rule(num_rows=st.integers(1, 6), num_steps=NUM_STEPS)
    def append_rows(self, num_rows: int, num_steps: int) -> None:
        self.job.num_rows += num_rows
        self._start(HOSTS[0], 2, 2, Resume.extend)
        self._go_on(self.workers[-1], num_steps)

    @precondition(lambda self: self.awake)
    @rule(which=CHOICE, num_steps=NUM_STEPS)
    def lose_reply(self, which: int, num_steps: int) -> None:
        """To the next hard link: it is made, and reported as refused."""
        self.machine.loses_reply = True
        self._go_on(self.awake[which % len(self.awake)], num_steps)

    @precondition(lambda self: self.awake)
    @rule(which=CHOICE, num_steps=NUM_STEPS)
    def lose_race(self, which: int, num_steps: int) -> None:
        """Another worker publishes the next shard at the last moment."""
        self.machine.rival = self._publish
        self._go_on(self.awake[which % len(self.awake)], num_steps)

    def _publish(self, path: Path) -> None:
        plan = self.job.check_always()
        assert plan is not None
        rival = self.job.ledger(plan, f"rival{self.num_started}")
        self.num_started += 1
        assert rival.open(plan.shard(int(path.stem[5:]))) == frozenset(), "a journal lacks what is to be published"
        rival.close()
        self.found.num_faults += 1

    @precondition(lambda self: self.awake)
    @rule(which=CHOICE, num_steps=NUM_STEPS)
    def look(self, which: int, num_steps: int) -> None:
        """As a dashboard does."""
        self._go_on(self.awake[which % len(self.awake)], num_steps)
        if self.job.check_always() is not None:
            status = read_status(self.job.output)
            assert status.num_published <= status.num_done <= status.plan.num_records
            assert list(status_lines(self.job.output, status))

    @invariant()
    def holds_always(self) -> None:
        self.job.check_always()

    def teardown(self) -> None:
        if not hasattr(self, "job"):
            return
        try:
            self._run_to_the_end()
        finally:
            for worker in self.living:
                worker.kill()
            self.patches.undo()
            shutil.rmtree(self.job.folder)

    def _run_to_the_end(self) -> None:
        """Everybody wakes or has been killed, a worker of another machine starts; all come to an end, the work too."""
        self.machine.loses_reply, self.machine.rival = False, None
        for worker in self.living if not self.has_survivors else []:
            worker.kill()
        self._start("elsewhere", 2, 3, Resume.extend)
        for number in range(MOST_STEPS):
            if not self.living:
                break
            for worker in self.living:
                worker.is_awake = True
                worker.step()
            if number % 20 == 19:
                self._advance(15)
        assert not self.living, "workers wait for each other, or for the dead"
        plan = self.job.check_always()
        assert plan is not None and plan.num_rows == self.job.num_rows
        assert not (self.job.output / "work").exists(), "work/ is left"
        rows = pq.read_table(self.job.output / "data").select(["row_index", "prompt_name", "sample_index"]).to_pylist()
        counts = Counter(tuple(row.values()) for row in rows)
        expected = [tuple(key) for number in range(plan.num_shards) for key in self.job.keys(plan.shard(number))]
        self.found.num_lost += len(set(expected) - counts.keys())
        self.found.num_doubled += sum(number - 1 for number in counts.values())
        self.found.num_redone += sum(number - 1 for number in self.job.made.values())
        assert sorted(counts.elements()) == sorted(expected)
        before = tree(self.job.output)
        assert Agenda(self.job.output, plan, None).shards() == []
        self._start("here", 1, 1, Resume.extend)
        while not self.workers[-1].has_ended:
            self.workers[-1].step()
        after = tree(self.job.output)
        for found in (before, after):
            found.pop("plan/.lock", None)  # who extends locks it
        assert after == before, "a start that had nothing to do has changed something"


@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # what a killed worker had open, nobody closes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("num_examples", [30, pytest.param(500, marks=pytest.mark.torture)])
def test_any_interleaving_of_workers(num_examples: int, tmp_path: Path, found: Found) -> None:
    """Fault 1, 8, 11, 12, 20, 28: kills, stops, races, lost replies, new rows, in any order: nothing is lost."""
    set_hypothesis_home_dir(tmp_path / "hypothesis")
    JobOfSeveralWorkers.folder, JobOfSeveralWorkers.found = tmp_path, found
    run_state_machine_as_test(
        JobOfSeveralWorkers,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=40,
            derandomize=True,  # the same ones every time, here and elsewhere
            database=None,
            deadline=None,
            phases=[Phase.generate],  # add Phase.shrink to find the shortest way to a failure: that takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )

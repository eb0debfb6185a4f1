"""What the other workers of a run say of themselves, for the one that shows, or tells trackers, what all of them do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.worker_stats import WorkerStats, WorkerStatsFiles, is_running
from pipeline.write.file import Place


class OtherWorkers:
    """The other workers of a run, as their heartbeats say; what they did before this one began does not count."""

    def __init__(self, own_path: Place, plan_id: str) -> None:
        self._own_name, self._plan_id = own_path.stem, plan_id
        self._files = WorkerStatsFiles(own_path.parent)
        self.running: Sequence[WorkerStats] = ()
        self.num_answered = self.num_errors = self.num_generated_tokens = 0
        self._before = {worker["name"]: worker for worker in self._stats()}

    def look(self) -> None:
        """Read their heartbeats."""
        there = self._stats()
        self.running = [worker for worker in there if is_running(worker)]
        self.num_answered, self.num_errors, self.num_generated_tokens = (
            self._since(there, key) for key in ("num_answered", "num_errors", "num_generated_tokens")
        )

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def rows_per_second(self) -> float:
        return float(sum(worker["rows_per_second"] for worker in self.running))

    @property
    def tokens_per_second(self) -> float:
        return float(sum(worker["tokens_per_second"] for worker in self.running))

    def _since(self, there: Iterable[WorkerStats], key: str) -> int:
        return sum(worker.get(key, 0) - self._before.get(worker["name"], {}).get(key, 0) for worker in there)

    def _stats(self) -> list[WorkerStats]:
        return [worker for worker in self._files.read(self._plan_id) if worker["name"] != self._own_name]

"""What the worker processes give, as the engine takes it: samples, and whether one is there without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from pipeline.errors import RowFault
from pipeline.preparation import Task, errors
from pipeline.records import Answer, EncodedSample, RecordKey, Stage
from pipeline.tensors.pool import Lost


class Intake(Iterator[EncodedSample]):
    """What the engine can answer; error records go straight to the ledger.

    Args:
        results: of the worker processes.
        record: takes the answers among them.
        is_ready: whether a result can be had without waiting.
        taken: hears of each sample before the engine has it; False where it is not to be asked any more.
    """

    def __init__(
        self,
        results: Iterator[list[EncodedSample | Answer] | Lost[Task]],
        record: Callable[[Answer], None],
        is_ready: Callable[[], bool] = lambda: True,
        taken: Callable[[RecordKey], bool] = lambda _: True,
    ) -> None:
        self._results, self._record, self._is_ready, self._taken = results, record, is_ready, taken
        self._samples: deque[EncodedSample] = deque()

    @property
    def ready(self) -> bool:
        """Whether `next` will not wait; a row that turns out to be an error may let it wait after all."""
        return bool(self._samples) or self._is_ready()

    def __next__(self) -> EncodedSample:
        while True:
            while not self._samples:
                self._fetch()
            sample = self._samples.popleft()
            if self._taken(sample.key):
                return sample

    def _fetch(self) -> None:
        result = next(self._results)
        if isinstance(result, Lost):
            result = errors(result.task, RowFault(Stage.DECODE, result.kind, f"the row {result.reason}"))
        for item in result:
            if isinstance(item, Answer):
                self._record(item)
            else:
                self._samples.append(item)

    def first(self, num_samples: int) -> list[EncodedSample]:
        """The next samples, which stay where they are."""
        head = list(islice(self, num_samples))
        self._samples.extendleft(reversed(head))
        return head

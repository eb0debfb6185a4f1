"""What the sampled rows are like: errors, sizes of images, lengths of prompts, and how fast they are prepared."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from pipeline.assembly import num_workers, preparation_options, worker_pool
from pipeline.config import RunConfig
from pipeline.forecast.foreseen import Foreseen
from pipeline.forecast.interval import Interval, share
from pipeline.forecast.look import OpeningOptions, SeenPrompt, SeenRow, lost, opening, preparing
from pipeline.preparation import Task
from pipeline.records import RecordKey
from pipeline.tensors.pool import Lost
from pipeline.vlm.identity import ModelIdentity

_MAX_WAITING = 64  # rows that are looked at ahead
_MAX_EXAMPLES = 5
_MAX_EXAMPLE_CHARACTERS = 300


@dataclass(frozen=True)
class Survey:
    """Rows that were looked at, in no order."""

    rows: Sequence[SeenRow]
    num_chosen: int  # rows that were to be looked at; more than were where time was short
    num_all: int  # rows that they were chosen from
    num_workers: int  # processes that prepare, of one worker of the run
    has_tokens: bool

    @cached_property
    def prompts(self) -> list[SeenPrompt]:
        """Those that can be asked."""
        return [prompt for row in self.rows for prompt in row.prompts if prompt.fault is None]

    @property
    def faults(self) -> Counter[str]:
        """Rows by "stage/type" of what is wrong with them, the commonest first."""
        found = Counter(f"{row.fault.stage}/{row.fault.kind}" for row in self.rows if row.fault)
        return Counter(dict(found.most_common()))

    @property
    def fault_share(self) -> Interval:
        """Of all rows, those that will have an error record."""
        return share(self.faults.total(), len(self.rows), self.num_all)

    @property
    def examples(self) -> list[tuple[str, str, str]]:
        """Kind of fault, id of a row that has it, and what is wrong; of each kind one before another of the same."""
        by_kind: dict[str, list[SeenRow]] = {}
        for row in self.rows:
            if row.fault:
                by_kind.setdefault(f"{row.fault.stage}/{row.fault.kind}", []).append(row)
        kinds = sorted(by_kind, key=lambda kind: -len(by_kind[kind]))
        rounds = range(max(map(len, by_kind.values()), default=0))
        found = [(kind, by_kind[kind][turn]) for turn in rounds for kind in kinds if turn < len(by_kind[kind])]
        return [(kind, row.id, _reason(row)) for kind, row in found[:_MAX_EXAMPLES]]

    @property
    def warnings(self) -> Counter[str]:
        """Rows by what is odd about them, the commonest first."""
        found = Counter(
            warning for row in self.rows for warning in {text for one in row.prompts for text in one.facts.warnings}
        )
        return Counter(dict(found.most_common()))

    @property
    def share_with_images(self) -> float:
        """Of all rows, those with a prompt that shows an image."""
        shown = [any(one.fault is None and one.facts.image_sha256 for one in row.prompts) for row in self.rows]
        return sum(shown) / max(1, len(shown))

    @property
    def num_too_long(self) -> int:
        """Rows with a prompt that leaves no room for an answer in the model's context."""
        kinds = [{one.fault.kind for one in row.prompts if one.fault} for row in self.rows]
        return sum("PromptTooLong" in found for found in kinds)

    @property
    def row_seconds(self) -> list[float]:
        """What it took a process to prepare each; the first of a process, which imports, is left out if it can be."""
        warm = [row.seconds for row in self.rows if row.number > 0]
        return warm or [row.seconds for row in self.rows if row.seconds]

    @property
    def cpu_seconds(self) -> float:
        """Of a core, to prepare a row; the mean."""
        warm = [row.cpu_seconds for row in self.rows if row.number > 0] or [row.cpu_seconds for row in self.rows]
        return sum(warm) / max(1, len(warm))

    @property
    def rows_per_second(self) -> float:
        """That one process prepares; 0 where no row was prepared."""
        seconds = sum(self.row_seconds)
        return len(self.row_seconds) / seconds if seconds else 0.0


def survey(
    config: RunConfig, found: Foreseen, identity: ModelIdentity | None, chosen: Sequence[int], seconds: float
) -> Survey:
    """Look at these rows, in worker processes as the run has them, for about so many seconds.

    identity: whose processor prepares them; None = none.

    Raises:
        UsageError, RunFailed: the source or the processor cannot be read.
    """
    if identity is None:
        options = OpeningOptions(found.template, config.prompt.max_image_pixels, config.dataset.allow_urls)
        pool = worker_pool(
            config, partial(opening, options), max_waiting=_MAX_WAITING, preload=("pipeline.forecast.look",)
        )
    else:
        prepared = preparation_options(config, identity, found.template, found.plan.fingerprint)
        pool = worker_pool(config, partial(preparing, prepared), max_waiting=_MAX_WAITING)
    rows: list[SeenRow] = []
    with pool:
        for result in pool.results(tasks(config, found, chosen, until=_clock(seconds))):
            rows.append(lost(result.task, result.kind, result.reason) if isinstance(result, Lost) else result)
    return Survey(rows, len(chosen), found.num_rows_left, num_workers(config), has_tokens=identity is not None)


def tasks(
    config: RunConfig, found: Foreseen, chosen: Sequence[int], until: Callable[[], bool] = lambda: False
) -> Iterator[Task]:
    """These rows with all that is asked about them. until: whether to stop."""
    dataset = config.dataset.open(found.inputs)
    names, samples = found.plan.prompt_names, range(found.plan.num_samples)
    for index in chosen:
        if until():
            return
        for row in dataset.rows(index, index + 1):
            yield Task(row, tuple(RecordKey(row.index, name, sample) for name in names for sample in samples))


def _clock(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have passed since it was asked first."""
    end: float | None = None

    def is_over() -> bool:
        nonlocal end
        end = time.monotonic() + seconds if end is None else end
        return time.monotonic() > end

    return is_over


def _reason(row: SeenRow) -> str:
    assert row.fault is not None
    return row.fault.message[:_MAX_EXAMPLE_CHARACTERS]

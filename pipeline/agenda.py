"""What a start of a worker has to do: which shards lack answers, and what is wanted of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.option import option
from pipeline.plan import Plan, plan_of_run
from pipeline.records import Shard, Stage
from pipeline.tally import Tally
from pipeline.write.file import Place
from pipeline.write.goal import FirstAnswers, Goal
from pipeline.write.retry import Retry, is_meant, roll_forward
from pipeline.write.schema import OutputSchema
from pipeline.write.shard import published_shards, shard_files, summaries_of_plan


@dataclass(kw_only=True, slots=True)
class RetryOptions:
    """The words that only `vlm-batch retry` knows."""

    only: list[str] = option(doc="stages, types or stage/type of the errors to ask again; empty = all", factory=list)


class Agenda:
    """Looks at the output folder once.

    A rank reads the footers of its own shards; of others' it goes by the names, which are given to whole shards alone.
    If all read all, a thousand workers would read each footer a thousand times. What lies under the name of a shard and
    is none is found by the rank that the shard belongs to, and by whoever writes the manifest.

    Args:
        only: None for the first answers; else the error records of these stages or types, or all, are asked once more.

    Raises:
        RunFailed: what an earlier start left half done cannot be finished.
    """

    def __init__(
        self, output_dir: Place, plan: Plan, only: Collection[str] | None, rank: int = 0, world: int = 1
    ) -> None:
        self._output_dir, self._plan, self._only, self._rank, self._world = output_dir, plan, only, rank, world
        roll_forward(output_dir / "work", output_dir / "data", plan.plan_id)
        files = dict(shard_files(output_dir / "data"))
        of_others = set() if only is not None else {number for number in files if number % world != rank}
        read = {number: path for number, path in files.items() if number not in of_others}
        self._published = summaries_of_plan(read, plan.plan_id)
        self._of_others = {number for number in of_others if number < plan.num_shards}  # by name
        self._foreign = read.keys() - self._published.keys()

    @property
    def has_journals(self) -> bool:
        """Whether earlier starts, or other workers, have answers in journals: some shards lack fewer than it seems."""
        return next((self._output_dir / "work").glob("part-*.journal"), None) is not None

    def shards(self) -> list[Shard]:
        """Those that lack answers: the rank's own in order, then the others' from the end.

        Others begin with theirs at the beginning, so that one that has time to help meets them late.
        """
        own = range(self._rank, self._plan.num_shards, self._world)
        others = (number for number in reversed(range(self._plan.num_shards)) if number % self._world != self._rank)
        return [self._plan.shard(number) for number in (*own, *others) if self._num_lacking(number)]

    def num_records(self, shards: Iterable[Shard]) -> int:
        """How many answers they lack, journals aside."""
        return sum(self._num_lacking(shard.number) for shard in shards)

    def settle(self, tally: Tally) -> None:
        """Count what is done for good."""
        for number, summary in self._published.items():
            if not self._num_lacking(number):
                tally.resume(summary.num_rows, summary.errors)
        tally.resume(sum(self._num_planned(number) for number in self._of_others), {})

    def goal(self, schema: OutputSchema, *, constants: Mapping[str, str | None], compression: str) -> Goal:
        """What is wanted of each shard. constants: the columns that are the same in every record."""
        plan = self._plan
        first = FirstAnswers(
            self._output_dir,
            schema,
            plan_id=plan.plan_id,
            prompt_names=plan.prompt_names,
            num_samples=plan.num_samples,
            constants=constants,
            compression=compression,
            foreign=self._foreign,
        )
        if self._only is None:
            return first
        return Retry(first, self._output_dir / "work", only=self._only, published=self._published.values())

    def _num_lacking(self, number: int) -> int:
        summary = self._published.get(number)
        if self._only is None:
            return 0 if summary or number in self._of_others else self._num_planned(number)
        errors = summary.errors if summary else {}
        return sum(times for error, times in errors.items() if is_meant(error, self._only))

    def _num_planned(self, number: int) -> int:
        shard = self._plan.shard(number)
        return (shard.stop - shard.start) * self._plan.records_per_row


def refuse_retry(output_dir: Place, only: Collection[str]) -> None:
    """Refuse what cannot be asked again, before anything heavy is imported.

    Raises:
        UsageError: there is no run in this folder, or `only` names an error that it does not have. Where no error is
            left every name may be one that was mended: a scheduled retry goes by the same words each time.
    """
    plan = plan_of_run(output_dir)
    errors: Counter[str] = Counter()
    for summary in published_shards(output_dir / "data", plan.plan_id).values():
        errors.update(summary.errors)
    known = {*errors, *(name for error in errors for name in error.split("/", 1)), *(str(stage) for stage in Stage)}
    if errors and (unknown := [name for name in only if name not in known]):
        there = ", ".join(f"{error} ({number})" for error, number in errors.most_common())
        raise UsageError(f"only={unknown}: no such errors in {output_dir}. There are: {there}.")

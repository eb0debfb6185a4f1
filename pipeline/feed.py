"""Which rows go into the pipeline next: those of the shards that nobody else has, without what is answered already."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from pipeline.dataset.base import Dataset
from pipeline.errors import RunFailed
from pipeline.plan import Plan
from pipeline.preparation import Task
from pipeline.records import Fault, RecordKey, Row, Shard, Stage
from pipeline.redaction import without_credentials
from pipeline.write.claim import HELP, Claims
from pipeline.write.goal import Goal
from pipeline.write.ledger import Ledger

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_MOST_POLL_SECONDS = 30.0  # where each look is a request: twice as long each time
_LOOK_SECONDS = 30.0  # how old may be what is known of others
_SHARDS_AT_ONCE = 64  # that an idle worker tries: of thousands of workers each would try what all others have
_PATIENCE_SECONDS = 5.0  # with those who have the last shards: what they are about to finish is not done twice
_ROWS_AT_ONCE = 64  # of a shard that is read from its end
_ENDED = Fault(Stage.GENERATE, "ProcessEnded", "the whole process ended whenever it was at this row, twice at it alone")


class Feed:
    """The tasks of one worker. image_column: where the output keeps the images, None if it does not."""

    def __init__(
        self,
        plan: Plan,
        dataset: Dataset,
        goal: Goal,
        ledger: Ledger,
        claims: Claims,
        image_column: str | None = None,
    ) -> None:
        self._plan, self._dataset, self._goal, self._ledger, self._claims = plan, dataset, goal, ledger, claims
        self._image_column = image_column
        self._in_work: dict[str, Shard] = {}  # by the name of the claim
        self._done: Collection[int] = ()
        self._looked_at = time.monotonic()  # when the shards to do were listed, about
        self._apart: list[
            tuple[Shard, Sequence[int], frozenset[RecordKey]]
        ] = []  # rows, of which those keys are missing

    def streams(self, shards: Sequence[Shard]) -> Iterator[Iterator[Task]]:
        """One stream of tasks; another follows as long as other workers have shards that lack something.

        A stream has to be drained before the next one: while rows of our own are on their way, waiting for another
        worker could mean that both wait for each other.
        """
        idle_since: float | None = None
        poll_seconds, num_tried = _POLL_SECONDS, len(shards)  # at first each of them
        while shards:
            shards, untried = shards[:num_tried], shards[num_tried:]
            postponed: list[Shard] = []
            yield self._tasks(shards, postponed)
            while self._apart:
                self._ledger.sync()  # should the process die now, these rows alone are under way
                yield self._group(*self._apart.pop())
            left = self.unfinished(postponed)
            num_tried = _SHARDS_AT_ONCE
            if len(left) < len(shards):
                idle_since, poll_seconds = None, _POLL_SECONDS
            elif idle_since is None:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since >= _PATIENCE_SECONDS and (shard := self._helped(left)):
                yield self._help(shard)
                left = self.unfinished(left)
            else:
                time.sleep(poll_seconds)
                if self._goal.looks_cost:
                    poll_seconds = min(2 * poll_seconds, _MOST_POLL_SECONDS)
            if untried:
                done = self._goal.done_meanwhile()
                untried = [shard for shard in untried if shard.number not in done]
            shards = [*untried, *left]

    def unfinished(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those of the shards that nobody has finished."""
        done = self._goal.done_meanwhile()
        return [shard for shard in shards if shard.number not in done and self._goal.reached(shard) is None]

    def _done_meanwhile(self) -> Collection[int]:
        """Shards that others have finished, as was known some seconds ago."""
        if time.monotonic() - self._looked_at > _LOOK_SECONDS:
            self._done, self._looked_at = self._goal.done_meanwhile(), time.monotonic()
        return self._done

    def _tasks(self, shards: Sequence[Shard], postponed: list[Shard]) -> Iterator[Task]:
        for shard in shards:
            self._release_published()
            if shard.number in self._done_meanwhile():
                continue
            if not self._take(shard, shard.name):
                postponed.append(shard)
                continue
            missing = self._ledger.open(shard)
            if not self._ledger.is_open(shard):
                continue  # the journals held all of it, or another worker published it before our claim
            suspects = self._ledger.suspects(shard)
            if groups := suspects.groups:
                log.warning(
                    "%s: %d rows were under way when processes ended; asked apart", shard.name, sum(map(len, groups))
                )
                self._apart += [(shard, group, missing) for group in reversed(groups)]  # taken from the end
            apart = frozenset(itertools.chain(*groups))
            for row in self._dataset.rows(shard.start, shard.stop):
                if row.index not in apart:
                    guilty = row.index in suspects.culprits
                    yield from self._task(replace(row, fault=_ENDED) if guilty else row, shard, missing)

    def _helped(self, shards: Sequence[Shard]) -> Shard | None:
        """One of the shards, with which nobody else helps yet; none of those at which a process has died."""
        for shard in shards:
            if self._ledger.num_attempts(shard) <= 1 and self._take(shard, shard.name + HELP):
                return shard
        return None

    def _help(self, shard: Shard) -> Iterator[Task]:
        """What lacks of a shard that another worker has, from the end: that worker comes from the beginning."""
        log.info("%s: helping the worker that has it", shard.name)
        missing = self._ledger.open(shard, has_company=True)
        for start in reversed(range(shard.start, shard.stop, _ROWS_AT_ONCE)):
            rows = self._dataset.rows(start, min(start + _ROWS_AT_ONCE, shard.stop))
            for row in reversed(list(rows)):
                yield from self._task(row, shard, missing)
            if not self._ledger.is_open(shard):
                break
        self._release_published()

    def _group(self, shard: Shard, indices: Sequence[int], missing: frozenset[RecordKey]) -> Iterator[Task]:
        for index in indices:
            for row in self._dataset.rows(index, index + 1):
                yield from self._task(row, shard, missing)

    def _task(self, row: Row, shard: Shard, missing: frozenset[RecordKey]) -> Iterator[Task]:
        keys = tuple(key for key in self._keys(row.index) if key in missing)
        if keys := self._ledger.lacking(shard, keys):
            self._ledger.expect(self._kept(row), keys, shard)
            yield Task(row, keys)

    def _keys(self, row_index: int) -> Iterator[RecordKey]:
        for name in self._plan.prompt_names:
            for sample_index in range(self._plan.num_samples):
                yield RecordKey(row_index, name, sample_index)

    def _kept(self, row: Row) -> Row:
        """The row as the output keeps it: with the images as a column, where they are kept; bytes come with answers."""
        if self._image_column is None:
            return row
        images = [{"bytes": None, "path": ref.path and without_credentials(ref.path)} for ref in row.images]
        return replace(row, columns={**row.columns, self._image_column: images})

    def _take(self, shard: Shard, name: str) -> bool:
        try:
            if self._claims.take(name):
                self._in_work[name] = shard
                return True
        except OSError as problem:
            path = self._claims.path(name)
            raise RunFailed(f"{path} cannot be written: {problem}. Restore the folder and run again.") from problem
        return False

    def _release_published(self) -> None:
        for name in [name for name, shard in self._in_work.items() if not self._ledger.is_open(shard)]:
            del self._in_work[name]
            if name.endswith(HELP):  # stays, so that the owner looks what became of its shard
                self._claims.leave(name)
            else:
                self._claims.release(name)

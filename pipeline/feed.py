"""Which rows go into the pipeline next: those of the shards that nobody else has, without what is answered already."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.dataset.base import Dataset
from pipeline.errors import RowFault, RunFailed
from pipeline.plan import Plan
from pipeline.preparation import Task
from pipeline.prompt.image import image_bytes
from pipeline.records import ImageRef, RecordKey, Row, Shard
from pipeline.write.claim import Claims
from pipeline.write.ledger import Ledger
from pipeline.write.shard import published_shards

_POLL_SECONDS = 1.0


class Feed:
    """The tasks of one worker. image_column: where the output keeps the images, None if it does not."""

    def __init__(
        self,
        output_dir: Path,
        plan: Plan,
        dataset: Dataset,
        ledger: Ledger,
        claims: Claims,
        image_column: str | None = None,
    ) -> None:
        self._data_dir = output_dir / "data"
        self._plan, self._dataset, self._ledger, self._claims = plan, dataset, ledger, claims
        self._image_column = image_column
        self._in_work: list[Shard] = []

    def streams(self, shards: Sequence[Shard]) -> Iterator[Iterator[Task]]:
        """One stream of tasks; another follows as long as other workers have shards that are not published.

        A stream has to be drained before the next one: while rows of our own are on their way, waiting for another
        worker could mean that both wait for each other.
        """
        while shards:
            postponed: list[Shard] = []
            yield self._tasks(shards, postponed)
            left = self.unpublished(postponed)
            if len(left) == len(shards):
                time.sleep(_POLL_SECONDS)
            shards = left

    def unpublished(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those of the shards that nobody has published."""
        done = published_shards(self._data_dir, self._plan.plan_id) if shards else {}
        return [shard for shard in shards if shard.number not in done]

    def _tasks(self, shards: Sequence[Shard], postponed: list[Shard]) -> Iterator[Task]:
        for shard in shards:
            self._release_published()
            if not self._take(shard):
                postponed.append(shard)
                continue
            self._in_work.append(shard)
            answered = self._ledger.open(shard)
            if not self._ledger.is_open(shard):
                continue  # the journals held all of it, or another worker published it before our claim
            for row in self._dataset.rows(shard.start, shard.stop):
                keys = tuple(key for key in self._keys(row.index) if key not in answered)
                if keys:
                    self._ledger.expect(self._kept(row), keys, shard)
                    yield Task(row, keys)

    def _keys(self, row_index: int) -> Iterator[RecordKey]:
        for name in self._plan.prompt_names:
            for sample_index in range(self._plan.num_samples):
                yield RecordKey(row_index, name, sample_index)

    def _kept(self, row: Row) -> Row:
        """The row as the output keeps it: with its images as a column, where they are kept."""
        if self._image_column is None:
            return row
        images = [{"bytes": _bytes(ref), "path": ref.path} for ref in row.images]
        return replace(row, columns={**row.columns, self._image_column: images})

    def _take(self, shard: Shard) -> bool:
        try:
            return self._claims.take(shard.name)
        except OSError as problem:
            raise RunFailed(
                f"{shard.name} cannot be claimed: {problem}. Restore the folder and run again."
            ) from problem

    def _release_published(self) -> None:
        for shard in [shard for shard in self._in_work if not self._ledger.is_open(shard)]:
            self._in_work.remove(shard)
            self._claims.release(shard.name)


def _bytes(ref: ImageRef) -> bytes | None:
    try:
        return image_bytes(ref)
    except RowFault:  # the worker that opens the image meets the same fault: it is in the row's error record
        return None

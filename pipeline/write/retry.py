"""Error records asked once more: a shard's next generation, put in the place of the file that is there.

    work/part-00042.g1.<attempt>.journal   the new answers, as they come
    work/part-00042.g1.parquet             all records of the shard, created exclusively: of two workers one wins
    data/part-00042.parquet                replaced by it in one step, if it is still of the generation before

Anyone may do the last step: it is done again by whoever finds it undone. The file in work/ keeps its name until the
folder is cleared, so that nobody creates the same generation twice. There is never more than one file of a shard in
data/, and an answer that was there stays what it was.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from pipeline.errors import RunFailed
from pipeline.records import Shard
from pipeline.write.crash_point import crash_point
from pipeline.write.file import NO_HARD_LINKS, Place, matching, sync_directory
from pipeline.write.goal import FirstAnswers, Wanted, error_counts, in_input_order, record_keys, summary_of
from pipeline.write.object_store import ObjectPath
from pipeline.write.schema import ShardSummary
from pipeline.write.shard import publish_shard, read_shard, summary_of_plan

_GENERATION = re.compile(r"(part-\d{5,})\.g(\d+)\.parquet")
_FILE = re.compile(r"(part-\d{5,})\.(?:g(\d+)\.)?.+")


class Retry:
    """Other records in the place of error records; see the module's docstring.

    Args:
        first: how the shards that are there were published.
        only: the errors that are asked again (see is_meant).
        published: the shards as this start found them; each is wanted in the next generation.
    """

    def __init__(
        self, first: FirstAnswers, work_dir: Place, *, only: Collection[str], published: Iterable[ShardSummary]
    ) -> None:
        self.schema, self.plan_id = first.schema, first.plan_id
        self._first, self._work_dir, self._only = first, work_dir, only
        self._targets = {summary.shard: summary.generation + 1 for summary in published}

    def stem(self, shard: Shard) -> str:
        return f"{shard.name}.g{self._targets[shard.number]}"

    def wanted(self, shard: Shard) -> Wanted:
        """The error records that are meant.

        Raises:
            RunFailed: the shard's file is gone or damaged.
        """
        table, names = read_shard(self._first.final(shard)), self.schema.column
        stages, kinds = (table[names(name)].to_pylist() for name in ("error_stage", "error_type"))
        meant = [
            stage is not None and is_meant(f"{stage}/{kind}", self._only)
            for stage, kind in zip(stages, kinds, strict=True)
        ]
        attempts = zip(record_keys(table, self.schema), table[names("attempt")].to_pylist(), meant, strict=True)
        settled = table.filter(pa.array([not one for one in meant], pa.bool_()))
        return Wanted(
            self.stem(shard),
            self._targets[shard.number],
            {key: attempt + 1 for key, attempt, again in attempts if again},
            len(settled),
            error_counts(settled, self.schema),
        )

    def reached(self, shard: Shard) -> ShardSummary | None:
        self._put_in_place(shard)
        summary = summary_of_plan(self._first.final(shard), self.plan_id)
        return summary if summary is not None and summary.generation >= self._targets[shard.number] else None

    def done_meanwhile(self) -> Collection[int]:
        return ()  # names say nothing of generations

    @property
    def looks_cost(self) -> bool:
        return self._first.looks_cost

    def publish(
        self, shard: Shard, wanted: Wanted, journal: pa.Table, *, numerics: Mapping[str, str], attempt_path: Place
    ) -> bool:
        before = summary_of_plan(self._first.final(shard), self.plan_id)
        if before is None:
            raise RunFailed(
                f"{self._first.final(shard)} was removed or damaged meanwhile; vlm-batch run makes it anew."
            )
        if before.generation != wanted.generation - 1:
            return False
        fresh = self.schema.publish(journal, self._first.constants)
        replaced = set(record_keys(fresh, self.schema))
        old = read_shard(self._first.final(shard)).replace_schema_metadata(None)
        old = old.filter(pa.array([key not in replaced for key in record_keys(old, self.schema)], pa.bool_()))
        table = in_input_order(
            pa.concat_tables([old, fresh]).unify_dictionaries(), self.schema, self._first.prompt_names
        )
        changed = {f"retry.{name}": value for name, value in numerics.items() if before.numerics.get(name) != value}
        won = publish_shard(
            table,
            summary_of(table, self.schema, self.plan_id, shard, dict(before.numerics) | changed, wanted.generation),
            final=self._work_dir / f"{wanted.stem}.parquet",
            attempt_path=attempt_path,
            compression=self._first.compression,
            confirm=self._first.confirm,
        )
        crash_point("generation_published")
        self._put_in_place(shard)
        return won

    def _put_in_place(self, shard: Shard) -> None:
        generation = self._targets[shard.number]  # one file: to list work/ for each shard would cost shards squared
        path = self._work_dir / f"{self.stem(shard)}.parquet"
        put_in_place(path, self._first.final(shard), generation, self.plan_id)


def is_meant(error: str, only: Collection[str]) -> bool:
    """Whether an error, "stage/type", is among those that `only` names by stage, type or both; empty = all are."""
    return not only or any(name in only for name in (error, *error.split("/", 1)))


def generations(work_dir: Place) -> Iterator[tuple[str, int, Place]]:
    """Files of later generations in work/, oldest first: the shard's name, the generation, the file."""
    found = ((_GENERATION.fullmatch(path.name), path) for path in work_dir.glob("part-*.g*.parquet"))
    yield from sorted((match[1], int(match[2]), path) for match, path in found if match)


def roll_forward(work_dir: Place, data_dir: Place, plan_id: str) -> None:
    """Put next generations in the place of their shards' files, where nobody has done it.

    Raises:
        RunFailed: the folder cannot be written.
    """
    for name, generation, path in generations(work_dir):
        put_in_place(path, data_dir / f"{name}.parquet", generation, plan_id)


def put_in_place(path: Place, final: Place, generation: int, plan_id: str) -> None:
    """Put one next generation in the place of its shard's file; nothing where it is not there, or not the next.

    Raises:
        RunFailed: the folder cannot be written.
    """
    version = final.version() if isinstance(final, ObjectPath) else None  # asked first: what is looked at is no newer
    now, then = summary_of_plan(final, plan_id), summary_of_plan(path, plan_id)
    if now is None or then is None or (now.generation, then.generation) != (generation - 1, generation):
        return
    try:
        if isinstance(final, ObjectPath):
            final.exchange(path.read_bytes(), version)  # refused where another worker has done it
        elif isinstance(path, Path):
            _move_copy(path, final)
        crash_point("generation_in_place")
        sync_directory(final.parent)
    except FileNotFoundError:  # by another worker, which has cleared work/ away
        return
    except OSError as problem:
        raise RunFailed(f"{final} cannot be replaced by {path}: {problem}.") from problem


def _move_copy(path: Path, final: Path) -> None:
    """Replace a file by another one, which keeps its own name, too."""
    second_name = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            os.link(path, second_name)
        except FileExistsError:  # nobody else knows the name: a lost reply of a link that was made (NFS)
            pass
        except OSError as problem:
            if problem.errno not in NO_HARD_LINKS:
                raise
            second_name = path
        os.replace(second_name, final)
    finally:
        if second_name != path:
            with suppress(OSError):
                second_name.unlink()


def strays(work_dir: Place, generations_done: Mapping[str, int]) -> Iterator[Place]:
    """What is left in work/ of attempts that were killed or lost a race, once every shard is published.

    A retry may be at work meanwhile: what belongs to a generation that is not in place yet stays.
    """
    for path in matching(work_dir, "part-*"):
        match = _FILE.fullmatch(path.name)
        if match and path.is_file() and int(match[2] or 0) <= generations_done.get(match[1], -1):
            yield path
    yield from (path for path in matching(work_dir, "*.tmp") if path.is_file() and path.name[:5] != "part-")
    yield from matching(work_dir, "manifest.claim")  # of whoever is just at it, or was killed there

"""What a start of `run` would find or make: its plan, and the rows that are left to do. Nothing is written.

What such a start refuses before it loads a model is refused here, in the same words.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, answer_settings
from pipeline.dataset.base import Inputs
from pipeline.dataset.extend import extended_inputs
from pipeline.draft import drafted, grown_plan, may_grow, refuse_nothing_asked, versioned
from pipeline.errors import SettingsChanged
from pipeline.plan import Plan, Settings, read_inputs, read_plan
from pipeline.planning import Resume, refuse_changes, refuse_stray_files, unwritable
from pipeline.prompt.template import Template
from pipeline.run import checked, scanned, settings_of
from pipeline.status import Status, read_status
from pipeline.vlm.identity import ModelIdentity
from pipeline.write.file import Place
from pipeline.write.object_store import ObjectPath
from pipeline.write.schema import OutputSchema

_OF_MODEL = ("vlm.", "generation.")  # settings that only its files make whole


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A plan, and what is left of it."""

    plan: Plan
    inputs: Inputs
    template: Template
    schema: OutputSchema
    is_new: bool  # no start has written it yet
    num_done: int  # records
    ranges: tuple[tuple[int, int], ...]  # rows of the shards that are not published: first, and after the last
    inputs_bytes: int  # of the file that lists the source; 0 where it is there already

    @property
    def num_left(self) -> int:
        """Records."""
        return self.plan.num_records - self.num_done

    @property
    def num_rows_left(self) -> int:
        """Rows of shards that are not published."""
        return sum(stop - start for start, stop in self.ranges)


def foreseen(
    config: RunConfig, identity: ModelIdentity | None, refuse: Callable[[Template], None] = lambda _: None
) -> Foreseen:
    """What a start with this configuration would go by.

    identity: None where nothing is to be known of the model; its settings are not compared with an old plan's then.
    refuse: raises where the templates of a new plan do not suit the model.

    Raises:
        UsageError, SettingsChanged, RunFailed: as `run` before it loads a model.
    """
    output_dir = config.output_path
    refuse_nothing_asked(config.write.shard_rows, config.generation.n, config.prompt_names)
    found = _found(config, identity)
    if found is not None:
        plan, inputs = found
        template, schema = checked(config, inputs)
        status = read_status(output_dir)
        ranges = _ranges(plan, status)
        num_done = min(status.num_done, plan.num_records)
        return Foreseen(plan, inputs, template, schema, False, num_done, ranges, 0)
    if not _to_be_moved(config):
        refuse_stray_files(output_dir)
    _refuse_unwritable(output_dir)
    inputs = scanned(config)
    template, schema = checked(config, inputs)
    refuse(template)
    settings = answer_settings(config) if identity is None else settings_of(config, identity)
    plan, content = drafted(
        inputs,
        versioned(settings),
        max_rows=config.dataset.max_rows,
        shard_rows=config.write.shard_rows,
        prompt_names=config.prompt_names,
        num_samples=config.generation.n,
    )
    return Foreseen(plan, inputs, template, schema, True, 0, ((0, plan.num_rows),), len(content))


def _found(config: RunConfig, identity: ModelIdentity | None) -> tuple[Plan, Inputs] | None:
    """The folder's plan with its inputs, grown where resume=extend would have it grow; None where a new one is made."""
    output_dir, max_rows = config.output_path, config.dataset.max_rows
    plan = read_plan(output_dir)
    if plan is None:
        return None
    settings = _comparable(config, identity, plan)
    scans: list[Inputs] = []  # a source is listed once

    def scan() -> Inputs:
        if not scans:
            scans.append(scanned(config))
        return scans[0]

    grown: tuple[Plan, Inputs] | None = None
    if config.resume is Resume.extend and may_grow(plan, settings):
        inputs = extended_inputs(read_inputs(output_dir, plan), scan(), bool(settings.get("dataset.id_column")))
        if extended := grown_plan(plan, inputs, settings, max_rows):
            grown = extended[0], inputs
    if grown is not None:
        return grown
    try:
        moved = refuse_changes(output_dir, plan, settings, scan, max_rows)
    except SettingsChanged:
        if config.resume is not Resume.overwrite:
            raise
        return None
    if moved is not None:
        plan = replace(plan, root=moved.root)
    if not (output_dir / plan.inputs_file).exists():  # the first start was killed between the two files
        return plan, moved or scan()
    return plan, read_inputs(output_dir, plan, address=config.dataset.path)


def _comparable(config: RunConfig, identity: ModelIdentity | None, plan: Plan) -> Settings:
    """The settings to compare with a plan's; without a model the plan's own stand for what its files say."""
    if identity is not None:
        return versioned(settings_of(config, identity))
    known: dict[str, Any] = {
        name: value for name, value in answer_settings(config).items() if not name.startswith(_OF_MODEL)
    }
    theirs = {name: value for name, value in plan.settings.items() if name.startswith(_OF_MODEL)}
    return versioned(theirs | known)


def _to_be_moved(config: RunConfig) -> bool:
    return config.resume is Resume.overwrite and read_plan(config.output_path) is not None


def _ranges(plan: Plan, status: Status) -> tuple[tuple[int, int], ...]:
    """The rows of shards that are not published; neighbours as one range."""
    found: list[tuple[int, int]] = []
    for number in range(plan.num_shards):
        if number in status.shards:
            continue
        shard = plan.shard(number)
        if found and found[-1][1] == shard.start:
            found[-1] = (found[-1][0], shard.stop)
        else:
            found.append((shard.start, shard.stop))
    return tuple(found)


def _refuse_unwritable(output_dir: Place) -> None:
    """Refuse a folder that cannot be made or written, as far as that shows without writing. Object stores: not tried.

    Raises:
        RunFailed: it cannot.
    """
    if isinstance(output_dir, ObjectPath):
        return
    folder = existing_parent(output_dir)
    number = errno.ENOTDIR if not folder.is_dir() else 0 if os.access(folder, os.W_OK | os.X_OK) else errno.EACCES
    if number:
        problem = OSError(number, os.strerror(number), str(folder))
        raise unwritable(output_dir, problem) from problem


def existing_parent(folder: Path) -> Path:
    """The folder, or the one that it would be made in."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder

"""How a folder gets its plan, and what becomes of a start that finds one: it goes on, extends it, or is refused.

plan.json appears by an exclusive create: of two first starts one wins, and the other obeys its plan. The inputs follow
it and carry the hash that it names, so that whoever finds them missing may scan again and put them there. A later start
compares its settings with the plan's and reads nothing of the source to do so.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Any

from pipeline.dataset.base import Inputs
from pipeline.dataset.extend import extended_inputs
from pipeline.draft import drafted, grown_plan, inputs_content, may_grow, refuse_nothing_asked, versioned
from pipeline.errors import RunFailed, SettingsChanged, UsageError
from pipeline.overwrite import finish_moving, move_aside
from pipeline.plan import LOCATIONS, SOURCE, Plan, Settings, read_inputs, read_plan, source_identity
from pipeline.redaction import without_credentials
from pipeline.write.crash_point import crash_point
from pipeline.write.file import (
    Place,
    alone,
    create_file,
    exchange_file,
    prove_writable,
    replace_file,
    version_of,
)
from pipeline.write.goal import PLAN_FILE
from pipeline.write.object_store import ObjectPath
from pipeline.write.shard import published_shards, shard_files


class Resume(StrEnum):
    """What a start does in a folder that was planned with other settings."""

    auto = "auto"  # refuse; with the same settings go on
    extend = "extend"  # where the input alone has grown, plan what is new behind what is there; else as auto
    overwrite = "overwrite"  # move the old run aside; with the same settings go on


def open_plan(
    output_dir: Place,
    settings: Settings,
    *,
    scan: Callable[[], Inputs],
    max_rows: int | None,
    shard_rows: int,
    prompt_names: Sequence[str],
    num_samples: int,
    resume: Resume = Resume.auto,
) -> Plan:
    """The folder's plan if it has these settings, else a new one in a folder without a plan.

    settings: without the source's identity, which is taken from the plan where the source's path is unchanged.
    resume: what to do with a plan of other settings.

    Raises:
        SettingsChanged: the folder was planned with other settings; nothing was touched.
        UsageError: the folder holds shards but no plan, or nothing is asked about a row; nothing was touched.
        RunFailed: the folder cannot be written.
    """
    refuse_nothing_asked(shard_rows, num_samples, prompt_names)
    settings = versioned(settings)
    finish_moving(output_dir)
    inputs: Inputs | None = None
    if plan := read_plan(output_dir):
        if resume is Resume.extend:
            plan = _extended(output_dir, plan, settings, scan, max_rows)
        try:
            found = refuse_changes(output_dir, plan, settings, scan, max_rows)
        except SettingsChanged:
            if resume is not Resume.overwrite:
                raise
            inputs = scan()  # what is wrong with the new settings is found before anything moves
            move_aside(output_dir, plan.plan_id)
        else:
            if not (output_dir / plan.inputs_file).exists():  # the first start was killed between the two files
                _place_inputs(output_dir, plan, inputs_content(found or scan()))
            return plan if found is None else replace(plan, root=found.root)
    finish_moving(output_dir)  # waits for another start that is moving a run aside: its plan goes first
    refuse_stray_files(output_dir)
    try:
        prove_writable(output_dir)  # before a scan that may take minutes
    except OSError as problem:
        raise unwritable(output_dir, problem) from problem
    inputs = inputs or scan()
    make_folders(output_dir)
    plan, content = drafted(
        inputs,
        settings,
        max_rows=max_rows,
        shard_rows=shard_rows,
        prompt_names=prompt_names,
        num_samples=num_samples,
    )
    settings = plan.settings
    crash_point("plan_ready")
    try:
        won = create_file(output_dir / PLAN_FILE, _plan_content(plan), beside=output_dir / "work")
    except OSError as problem:
        raise unwritable(output_dir, problem) from problem
    if not won:
        plan = read_plan(output_dir) or plan  # another first start was quicker: its plan holds
        refuse_changes(output_dir, plan, settings, lambda: inputs, max_rows)
        plan = replace(plan, root=inputs.root)
    crash_point("plan_created")
    _place_inputs(output_dir, plan, content)
    crash_point("inputs_placed")
    return plan


def refuse_changes(
    output_dir: Place, plan: Plan, settings: Settings, scan: Callable[[], Inputs], max_rows: int | None
) -> Inputs | None:
    """Compare the settings of a start with the plan's.

    Returns:
        What a scan found, if the source lies elsewhere than it did for the plan.

    Raises:
        SettingsChanged: field by field what differs, and the ways out.
    """
    now, found = dict(settings), None
    if now.get(SOURCE) == plan.settings.get(SOURCE) and not _source_is_gone(output_dir, plan):
        now |= {name: value for name, value in plan.settings.items() if name not in now and name.startswith("dataset.")}
    else:
        found = scan()
        now |= source_identity(found, max_rows)
    names = sorted(set(now) | set(plan.settings))
    changed = [name for name in names if now.get(name) != plan.settings.get(name)]
    if not set(changed) - set(LOCATIONS):
        return found
    width = max(map(len, changed))
    lines = [f"  {name:{width}}  {_difference(plan.settings.get(name), now.get(name))}" for name in changed]
    ways_out = (
        "Choose another output_dir for the new settings, or start with the old ones to go on; resume=overwrite moves "
        "the old answers aside and begins anew, resume=extend takes in what was added to the input."
    )
    if not _has_answers(output_dir):
        ways_out = f"It holds no answer yet: remove the folder {output_dir}, or choose another output_dir."
    raise SettingsChanged(
        f"{output_dir} was planned with other settings; answers of two settings would mix:\n"
        + "\n".join(lines)
        + f"\n{ways_out} Nothing was changed."
    )


def _extended(
    output_dir: Place, plan: Plan, settings: Settings, scan: Callable[[], Inputs], max_rows: int | None
) -> Plan:
    """The plan with what was added to the source behind what it has; the same plan where that is nothing.

    Raises:
        SettingsChanged: something else has changed, too.
        UsageError: what was planned is not there as it was.
    """
    if not may_grow(plan, settings):
        return plan  # refused by the comparison that follows
    found = scan()
    with alone(output_dir / "plan" / ".lock"):  # of several starts one extends, and the others obey
        version = version_of(output_dir / PLAN_FILE)
        plan = read_plan(output_dir) or plan
        inputs = extended_inputs(read_inputs(output_dir, plan), found, bool(settings.get("dataset.id_column")))
        grown = grown_plan(plan, inputs, settings, max_rows)
        if grown is None:
            return plan
        plan, content = grown
        make_folders(output_dir)
        replace_file(output_dir / plan.inputs_file, content, beside=output_dir / "work")
        crash_point("inputs_extended")
        if not exchange_file(output_dir / PLAN_FILE, _plan_content(plan), version, beside=output_dir / "work"):
            return read_plan(output_dir) or plan  # another start was quicker where there are no locks
    return plan


def _plan_content(plan: Plan) -> bytes:
    return json.dumps(asdict(plan) | {"root": without_credentials(plan.root)}, indent=1).encode()


def make_folders(output_dir: Place) -> None:
    """Make the output folder and prove that it can be written, before any model loads.

    Raises:
        RunFailed: it cannot be made or written.
    """
    if isinstance(output_dir, ObjectPath):
        return  # no folders there; that objects can be put was shown when the plan was
    try:
        for name in ("plan", "data", "work", "stats"):
            (output_dir / name).mkdir(parents=True, exist_ok=True)
            prove_writable(output_dir / name)
    except OSError as problem:
        raise unwritable(output_dir, problem) from problem


def _has_answers(output_dir: Place) -> bool:
    journals = (path for path in (output_dir / "work").glob("*.journal") if path.stat().st_size)
    return next(shard_files(output_dir / "data"), None) is not None or next(journals, None) is not None


def _place_inputs(output_dir: Place, plan: Plan, content: bytes) -> None:
    """Put plan/inputs.parquet in its place, if it is not there and is the one that the plan names."""
    path = output_dir / plan.inputs_file
    if path.exists() or hashlib.sha256(content).hexdigest() != plan.inputs_sha256:
        return
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, content, beside=output_dir / "work")  # who else does this now has the same bytes
    except OSError as problem:
        raise unwritable(output_dir, problem) from problem


def _source_is_gone(output_dir: Place, plan: Plan) -> bool:
    """Whether rows are still to be read from a folder that is not there any more, relative paths and moves included."""
    if "://" in plan.root or os.path.exists(plan.root):
        return False
    return len(published_shards(output_dir / "data", plan.plan_id)) < plan.num_shards


def refuse_stray_files(output_dir: Place) -> None:
    """Refuse a folder without a plan that holds shards, or files that a run would replace: they are somebody's.

    Raises:
        UsageError: it does.
    """
    if next(shard_files(output_dir / "data"), None):
        raise UsageError(
            f"{output_dir} holds shards but no {PLAN_FILE}. Restore {PLAN_FILE}, or choose another output_dir."
        )
    for name in ("manifest.json", "report.html"):
        if (output_dir / name).exists():
            raise UsageError(
                f"{output_dir} holds no run, but a {name}, which the run would replace. Choose another output_dir, or "
                "move that file."
            )


def unwritable(output_dir: Place, problem: OSError) -> RunFailed:
    """What is said of a folder that cannot be written."""
    return RunFailed(f"output_dir {output_dir} cannot be written: {problem}. Choose a writable folder, or make room.")


def _difference(was: Any, now: Any) -> str:
    """Two values as JSON; long ones from shortly before the first place where they differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (was, now)]
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    start = max(0, same - 20)
    if max(map(len, texts)) > 80 and start:
        texts = ["..." + text[start:] for text in texts]
    texts = [text if len(text) <= 80 else text[:77] + "..." for text in texts]
    return "was {}, now {}".format(*texts)

"""resume=overwrite: the run of a folder is moved aside, into old/PLAN_ID, and the folder is planned anew.

The plan goes first, then work/, then data/. A worker of the old plan that is still alive looks at plan.json after it
has written its copy of a shard into work/ and before it gives it a name in data/: either the plan is another one, or
its copy has moved with the old work/ and cannot be named any more. So nothing of the old plan gets into the new data/.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from pipeline.errors import RunFailed, UsageError
from pipeline.write.crash_point import crash_point
from pipeline.write.file import Place, alone, sync_directory
from pipeline.write.goal import PLAN_FILE, plan_id_of
from pipeline.write.object_store import ObjectPath

log = logging.getLogger(__name__)

OLD_FOLDER = "old"
_NAMES = (
    *(PLAN_FILE, "work", "data", "plan", "manifest.json", "stats", "tracking"),
    *("report.html", "README.md", "score.json", "score_rows.parquet", "diff.json", "diff.html", "export"),
)
_UNFINISHED = "moving"  # a file in old/PLAN_ID until all has arrived there


def move_aside(output_dir: Place, plan_id: str) -> Path:
    """Move the run with this plan into old/PLAN_ID; nothing is done if another start was quicker.

    Raises:
        UsageError: it lies in an object store, where nothing can be moved in one step.
        RunFailed: it cannot be moved.
    """
    if isinstance(output_dir, ObjectPath):
        raise UsageError(
            f"resume=overwrite: objects cannot be moved aside, and none is deleted. Choose another output_dir, or "
            f"remove {output_dir} yourself."
        )
    aside = output_dir / OLD_FOLDER / plan_id
    try:
        aside.mkdir(parents=True, exist_ok=True)
        with alone(output_dir / OLD_FOLDER / ".lock"):
            if plan_id_of(output_dir) == plan_id:
                (aside / _UNFINISHED).touch()
                sync_directory(aside)
                crash_point("overwrite_begun")
                _move(output_dir, aside)
                log.info("resume=overwrite: the run that was here is in %s; remove it when you do not need it", aside)
    except OSError as problem:
        raise RunFailed(f"the run in {output_dir} cannot be moved to {aside}: {problem}.") from problem
    return aside


def finish_moving(output_dir: Place) -> None:
    """Move what an earlier start left behind when it was killed.

    Raises:
        RunFailed: it cannot be moved.
    """
    if isinstance(output_dir, ObjectPath):
        return
    try:
        for marker in sorted((output_dir / OLD_FOLDER).glob(f"*/{_UNFINISHED}")):
            with alone(output_dir / OLD_FOLDER / ".lock"):
                if marker.exists() and plan_id_of(output_dir) in (None, marker.parent.name):
                    _move(output_dir, marker.parent)
    except OSError as problem:
        raise RunFailed(f"what is left of an old run in {output_dir} cannot be moved: {problem}.") from problem


def _move(output_dir: Path, aside: Path) -> None:
    for name in _NAMES:
        with suppress(FileNotFoundError):
            os.rename(output_dir / name, aside / name)
        if name == PLAN_FILE:
            crash_point("overwrite_without_plan")
    sync_directory(output_dir)
    (aside / _UNFINISHED).unlink()

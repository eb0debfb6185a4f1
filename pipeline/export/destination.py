"""Where an export goes, and how its files get their names: only when they are whole.

Bytes are written under a name of their own beside the file, or, for an object store, into a temporary folder; a kill
leaves that and nothing under the file's name.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipeline.errors import RunFailed, UsageError
from pipeline.export.options import Exists
from pipeline.write.file import NO_HARD_LINKS, Place, place, sync_directory
from pipeline.write.object_store import ObjectPath

FOLDER = "export"  # in the run's folder: what is written where `to` is not given


def target(output_dir: Place, to: str | None, name: str) -> Place:
    """The file to write.

    to: a file; or a folder, which is there or ends with a slash, for a file called `name`.

    Raises:
        UsageError: it would lie among the run's own files.
    """
    if to is None:
        return output_dir / FOLDER / name
    found = place(to)
    if to.endswith("/") or found.is_dir():
        found = found / name
    refuse_own_files(output_dir, found)
    return found


def refuse_own_files(output_dir: Place, path: Place) -> None:
    """Refuse what lies in the run's folder, the folder for exports aside.

    Raises:
        UsageError: it does.
    """
    for parent in _parents(path):
        if parent == _absolute(output_dir / FOLDER):
            return
        if parent == _absolute(output_dir):
            raise UsageError(
                f"to={path} lies among the files of the run. Choose a place outside {output_dir}, or in "
                f"{output_dir / FOLDER}."
            )


def refuse_taken(path: Place, exists: Exists | None) -> None:
    """Refuse to write over a file without being told so.

    Raises:
        UsageError: it is there and `exists` is not overwrite, or it is a folder, or `exists` is a word for sidecars.
    """
    refuse_sidecar_words(exists)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; expected the name of a file.")
    if exists is None and (path.exists() or (isinstance(path, Path) and path.is_symlink())):
        raise UsageError(f"{path} is there already. exists=overwrite replaces it; to=... writes elsewhere.")


def refuse_sidecar_words(exists: Exists | None) -> None:
    """Refuse what can be done with the text files of images alone.

    Raises:
        UsageError: naming what is possible.
    """
    if exists not in (None, Exists.overwrite):
        raise UsageError(f"exists={exists.value} is for txt and caption; here it may be overwrite, or left out.")


@contextmanager
def new_file(path: Place) -> Iterator[IO[bytes]]:
    """A file to write, which is there under its name once the block has ended without an exception, in one step.

    A link under that name is replaced, not followed.

    Raises:
        RunFailed: it cannot be written; what was there before is unchanged.
    """
    try:
        if isinstance(path, ObjectPath):
            with tempfile.TemporaryDirectory(prefix="vlm-batch-") as folder:
                copy = Path(folder, "content")
                with open(copy, "xb") as file:
                    yield file
                path.upload(copy)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path.parent) as copy:
            with open(copy, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(copy, path)
        sync_directory(path.parent)
    except OSError as problem:
        raise RunFailed(f"{path} cannot be written: {problem}.") from problem


def put(path: Place, content: bytes, *, over: bool) -> bool:
    """Write a small file in one step, without waiting for the disk; False where it is there and stays.

    over: whether one that is there is replaced.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    if isinstance(path, ObjectPath):
        if over:
            path.replace(content)
            return True
        return not path.exists() and path.create(content)
    with _temporary(path.parent) as copy:
        with open(copy, "xb") as file:
            file.write(content)
        if not over:
            try:
                os.link(copy, path)
                return True
            except FileExistsError:
                return False
            except OSError as problem:
                if problem.errno not in NO_HARD_LINKS:
                    raise
                if os.path.lexists(path):
                    return False
        os.replace(copy, path)
        return True


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A name in a folder for as long as the block lasts. Short: the file's own may have all bytes that a name can."""
    path = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _absolute(path: Place) -> Place:
    return path if isinstance(path, ObjectPath) else Path(os.path.realpath(path))


def _parents(path: Place) -> Iterator[Place]:
    """The folders that a path lies in, links resolved, and itself first."""
    path = _absolute(path)
    while True:
        yield path
        if path.parent == path or not path.name:
            return
        path = path.parent

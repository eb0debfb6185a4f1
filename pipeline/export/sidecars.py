"""format=txt, format=caption: a text file for each image, beside it or in a folder of its own under the same names.

What trainers of image models read (kohya's sd-scripts and others take IMAGE.txt or IMAGE.caption). What somebody has
written into such a file is not lost: one that is there stays unless `exists` says otherwise, one that is no text stays,
links are never followed, and a file is there in one step or not at all.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import uuid
from pathlib import Path, PurePosixPath

from pipeline.dataset.files import is_local, local_path
from pipeline.errors import RunFailed, UsageError
from pipeline.export.destination import put, refuse_own_files
from pipeline.export.options import COMMON, Errors, Exists, ExportOptions
from pipeline.export.selection import Selection
from pipeline.export.sidecar_names import SidecarNames
from pipeline.write.file import Place, place
from pipeline.write.object_store import ObjectPath

OBEYED = COMMON | {"to", "root", "prefix", "separator", "one_line", "full_names"}
ERRORS = Errors.skip
_LINE_BREAKS = re.compile("[ \t]*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029][\\s\x1c-\x1e]*")

_THERE = "files that were there already"
_SAID = "files that have these words there already"
_NO_PATH = "ids that are no path inside a folder"
_OUTSIDE = "folders that lead elsewhere by a link"
_GONE = "folders that are not there any more"
_IN_THE_WAY = "a link, a folder or something else in the way"
_NO_TEXT = "files that are no UTF-8 text, so that nothing can be added to them"
_TOO_LONG = "names that are too long for the file system"
_NO_FAULT = (_THERE, _SAID)


def export(selection: Selection, options: ExportOptions, output_dir: Place) -> str:
    """Write them; where they are, as a phrase.

    Raises:
        UsageError: there is no folder to write to, or two images would have one file. Nothing is written.
        RunFailed: a file cannot be written; those before it are there.
    """
    assert options.format is not None
    selection.require_one_per_row(f"format={options.format} writes one text for an image.")
    is_beside = options.to is None
    folder = _beside(selection, options) if is_beside else _elsewhere(options, output_dir)
    names = SidecarNames(selection, options, beside_sources=is_beside)
    names.refuse_clashes(ignore_case=_ignores_case(folder))
    writer = _Writer(folder, options, makes_folders=not is_beside)
    for table in selection.tables(["id", "response"]):
        for row_id, response in zip(table["id"].to_pylist(), table["response"].to_pylist(), strict=True):
            text = _text(response or "", options.one_line)
            if not text:
                selection.left_out["empty answers"] += 1
                continue
            name = names.of(row_id)
            obstacle = _NO_PATH if name is None else writer.write(name, options.prefix + text)
            if obstacle is None:
                selection.num_written += 1
            elif obstacle in _NO_FAULT:
                selection.left_out[obstacle] += 1
            else:
                selection.fail(obstacle, row_id)
    return f"beside the images in {folder}" if is_beside else f"in {folder}"


def _beside(selection: Selection, options: ExportOptions) -> Path:
    root = options.root or selection.plan.root
    if selection.plan.settings["dataset.kind"] != "images" or not is_local(root):
        raise UsageError(
            f"format={options.format} writes beside the images where those are files of a local folder "
            f"(dataset=images). Give a folder for the texts: to=..."
        )
    folder = Path(local_path(root))
    if not folder.is_dir():
        raise UsageError(f"{folder}, where the images were, is not there. root=... says where they are now.")
    return folder


def _elsewhere(options: ExportOptions, output_dir: Place) -> Place:
    assert options.to is not None
    if options.root is not None:
        raise UsageError("root= says where the images lie, beside which the texts go; with to= it means nothing.")
    folder = place(options.to)
    refuse_own_files(output_dir, folder)
    if isinstance(folder, Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise RunFailed(f"{folder} cannot be made: {problem}.") from problem
    return folder


def _text(response: str, one_line: bool) -> str:
    """The answer as it is written: no blanks around it, no line breaks of other systems."""
    if one_line:
        return _LINE_BREAKS.sub(" ", response).strip()
    return response.replace("\r\n", "\n").replace("\r", "\n").strip()


def _ignores_case(folder: Place) -> bool:
    """Whether A.txt and a.txt are the same file there.

    Raises:
        RunFailed: the folder cannot be written.
    """
    if isinstance(folder, ObjectPath):
        return False
    probe = folder / f".CASE-{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        try:
            return probe.with_name(probe.name.lower()).exists()
        finally:
            probe.unlink(missing_ok=True)
    except OSError as problem:
        raise RunFailed(f"{folder} cannot be written: {problem}.") from problem


class _Writer:
    """Texts into files below a folder."""

    def __init__(self, folder: Place, options: ExportOptions, *, makes_folders: bool) -> None:
        self._folder, self._options, self._makes_folders = folder, options, makes_folders
        self._exists = options.exists or Exists.skip
        self._inside: dict[str, str | None] = {}  # relative folders that were looked at -> what is wrong with them

    def write(self, name: str, text: str) -> str | None:
        """What is in the way; None where the text is written.

        Raises:
            RunFailed: the disk is full, a folder is read-only ...
        """
        path = self._folder / name
        try:
            if isinstance(path, ObjectPath):
                return self._put(path, text, path.read_bytes() if self._adds and path.exists() else None)
            parent = str(PurePosixPath(name).parent)
            if parent not in self._inside:
                self._inside[parent] = self._obstacle(path.parent)
            if obstacle := self._inside[parent]:
                return obstacle
            return self._put_file(path, text)
        except OSError as problem:
            if problem.errno == errno.ENAMETOOLONG:
                return _TOO_LONG
            raise RunFailed(f"{path} cannot be written: {problem}.") from problem

    @property
    def _adds(self) -> bool:
        return self._exists in (Exists.append, Exists.prepend)

    def _obstacle(self, folder: Path) -> str | None:
        """What is wrong with a folder below ours, which is made where it is not there."""
        root = os.path.realpath(str(self._folder))
        if os.path.commonpath([root, os.path.realpath(folder)]) != root:
            return _OUTSIDE
        if not self._makes_folders:
            return None if folder.is_dir() else _GONE
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            return _IN_THE_WAY
        return None

    def _put_file(self, path: Path, text: str) -> str | None:
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return self._put(path, text, None)
        if self._exists is Exists.skip:
            return _THERE
        if not stat.S_ISREG(mode):
            return _IN_THE_WAY
        return self._put(path, text, path.read_bytes() if self._adds else None)

    def _put(self, path: Place, text: str, earlier: bytes | None) -> str | None:
        if earlier is not None:
            try:
                old = earlier.decode("utf-8-sig")
            except UnicodeDecodeError:
                return _NO_TEXT
            joined = self._joined(old, text)
            if joined is None:
                return _SAID
            text = joined
        return None if put(path, text.encode(), over=self._exists is not Exists.skip) else _THERE

    def _joined(self, old: str, text: str) -> str | None:
        """Both; None where the old text has the new one at its end or beginning already, as after a first export."""
        separator = self._options.separator
        if not (bare := old.strip()):
            return text
        if self._exists is Exists.append:
            return None if bare == text or bare.endswith(separator + text) else old.rstrip() + separator + text
        return None if bare == text or bare.startswith(text + separator) else text + separator + old.lstrip()

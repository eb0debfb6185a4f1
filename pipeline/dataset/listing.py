"""The files of a source, in an order that no file system decides.

    listed("photos")  listed("photos/**/*.jpg")  listed("shards/{000..010}.tar")  listed("s3://bucket/photos")

Plain local paths are walked with os.scandir, anything with a scheme goes through fsspec.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.dataset.files import NOT_A_FILE, is_local, joined, local_path
from pipeline.dataset.patterns import brace_words, glob_regex, is_pattern, natural_key
from pipeline.errors import UsageError

Accepts = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Listing:
    """Files below `root` in natural order; a size of NOT_A_FILE marks what must not be opened."""

    root: str
    paths: list[str]
    sizes: list[int]
    num_others: int = 0  # files that were there but not accepted
    warnings: tuple[str, ...] = ()


def listed(path: str, accepts: Accepts) -> Listing:
    """Files that a folder (recursively), a glob, a brace pattern or a single name stands for.

    `accepts` is asked with the path relative to the root; a single name is taken unasked. Hidden files and folders
    are left out and counted in a warning.

    Raises:
        UsageError: nothing has that name, no file fits the glob, or a folder cannot be read.
    """
    if not path:
        raise UsageError("dataset.path is empty; expected a folder, a file, a glob or a URL.")
    try:
        source = _Local() if is_local(path) else _Remote(path)
        path = local_path(path) if is_local(path) else path
        if source.is_folder(path):
            return _sorted(path, source.walk(path, accepts, None))
        if source.exists(path):
            root, name = _parent(path)
            return _sorted(root, _Found([name], [source.size(path)]))
        if not is_pattern(path):
            raise UsageError(f"dataset.path={path} does not exist.")
        return _globbed(source, path, accepts)
    except (OSError, ImportError, ValueError) as error:
        raise UsageError(f"dataset.path={path} cannot be listed: {error}") from error


def regular(listing: Listing, what: str) -> Listing:
    """The listing of a source whose files hold many rows each: there a FIFO or dangling link is the user's mistake."""
    for path, size in zip(listing.paths, listing.sizes, strict=True):
        if size == NOT_A_FILE:
            raise UsageError(f"{joined(listing.root, path)} is not a regular file; expected {what}.")
    return listing


@dataclass(slots=True)
class _Found:
    """What a walk came by, unsorted."""

    paths: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    num_others: int = 0
    num_hidden: int = 0
    num_links: int = 0


def _parent(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return _folder(folder), name


def _folder(path: str) -> str:
    return path + "/" if path == "" or path.endswith(":/") else path  # the root of a disk or of a store


def _sorted(root: str, found: _Found) -> Listing:
    paths, sizes, warnings = found.paths, found.sizes, list[str]()
    try:
        for start in range(0, len(paths), 65536):
            "\n".join(paths[start : start + 65536]).encode()
    except UnicodeEncodeError:  # names that are not UTF-8: listed under an escaped name that cannot be opened
        names = [path.encode("utf-8", "backslashreplace").decode() for path in paths]
        sizes = [size if name == path else NOT_A_FILE for size, name, path in zip(sizes, names, paths, strict=True)]
        odd = [name for name, path in zip(names, paths, strict=True) if name != path]
        warnings.append(f"{len(odd)} file names are not UTF-8 and cannot be read, e.g. {min(odd)}: rename them")
        paths = names
    order = sorted(zip(map(natural_key, paths), paths, sizes, strict=True))
    if found.num_hidden:
        warnings.append(f"{found.num_hidden} hidden files or folders skipped in {root}")
    if found.num_links:
        warnings.append(f"{found.num_links} links to folders that are listed anyway skipped in {root}")
    return Listing(
        root, [entry[1] for entry in order], [entry[2] for entry in order], found.num_others, tuple(warnings)
    )


def _globbed(source: _Local | _Remote, path: str, accepts: Accepts) -> Listing:
    segments = path.split("/")
    first = next(number for number, segment in enumerate(segments) if is_pattern(segment))
    root, pattern = _folder("/".join(segments[:first])), "/".join(segments[first:])
    if not source.is_folder(root):
        raise UsageError(f"dataset.path={path}: there is no folder {root}.")
    words = list(brace_words(pattern))
    plain = {word for word in words if not is_pattern(word)}
    globs = [glob_regex(word) for word in words if word not in plain]
    matched: set[str] = set()

    def fits(name: str) -> bool:
        if name not in plain and not any(glob.fullmatch(name) for glob in globs):
            return False
        matched.add(name)
        return accepts(name)

    found = source.walk(root, fits, None if "**" in pattern else len(segments) - first)
    found.num_others = len(matched) - len(found.paths)
    missing = [word for word in words if word in plain and word not in matched]
    if missing:
        raise UsageError(f"dataset.path={path}: {len(missing)} files are not there, the first is {missing[0]}.")
    if not matched:
        raise UsageError(f"dataset.path={path} fits no file. ** looks into folders below, * into one folder.")
    return _sorted(root, found)


class _Local:
    """The operating system's files."""

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def size(self, path: str) -> int:
        try:
            status = os.stat(path)
        except FileNotFoundError:  # a dangling link
            return NOT_A_FILE
        return status.st_size if stat.S_ISREG(status.st_mode) else NOT_A_FILE

    def walk(self, root: str, accepts: Accepts, depth: int | None) -> _Found:
        found = _Found()
        base = root.rstrip("/") + "/"
        real_base = os.path.realpath(root).rstrip("/") + "/"
        seen: set[tuple[int, int]] = set()
        folders, links = [""], list[str]()
        while folders or links:
            if folders:
                folder = folders.pop()
            else:  # linked folders come last and in order, so that a loop of links ends the same way everywhere
                links.sort(key=natural_key, reverse=True)
                folder = links.pop()
                above = real_base.startswith(os.path.realpath(base + folder).rstrip("/") + "/")
                if above or _identity(base + folder) in seen:
                    found.num_links += 1
                    continue
            seen.add(_identity(base + folder))
            inside = depth is None or folder.count("/") < depth - 1
            with os.scandir(base + folder) as entries:
                for entry in entries:
                    name = folder + entry.name
                    if entry.name.startswith("."):
                        found.num_hidden += 1
                    elif _is_folder(entry):
                        if inside:
                            (links if entry.is_symlink() else folders).append(name + "/")
                    elif accepts(name):
                        found.paths.append(name)
                        found.sizes.append(_size(entry))
                    else:
                        found.num_others += 1
        return found


class _Remote:
    """Files behind an fsspec URL."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.files, _ = fsspec.core.url_to_fs(url)

    def exists(self, path: str) -> bool:
        return bool(self.files.exists(self._inner(path)))

    def is_folder(self, path: str) -> bool:
        return bool(self.files.isdir(self._inner(path)))

    def size(self, path: str) -> int:
        return int(self.files.size(self._inner(path)) or 0)

    def walk(self, root: str, accepts: Accepts, depth: int | None) -> _Found:
        found = _Found()
        base = self._inner(root).rstrip("/")
        for path, info in self.files.find(base, maxdepth=depth, detail=True).items():
            name = path[len(base) :].lstrip("/")
            if name.startswith(".") or "/." in name:
                found.num_hidden += 1
            elif accepts(name):
                found.paths.append(name)
                found.sizes.append(int(info.get("size") or 0) if info.get("type") == "file" else NOT_A_FILE)
            else:
                found.num_others += 1
        return found

    def _inner(self, path: str) -> str:
        import fsspec

        return str(fsspec.core.url_to_fs(path)[1])


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size if entry.is_file() else NOT_A_FILE
    except OSError:  # removed since it was listed, or a link to itself: the row will say so
        return NOT_A_FILE

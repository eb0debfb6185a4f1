"""An object store as a place for results: fsspec URLs (s3://, gs://, memory://), and what a run needs of them.

An object appears whole or not at all and has no rename, so what is published is put under its final name at once, on
the condition that nothing is there (S3: If-None-Match) or that it is what we saw (If-Match). A reply that never comes
says nothing about what was done: the object is read back before anybody decides. Nothing that landed is deleted.

`ObjectPath` has the methods of pathlib.Path that the program calls on its output folder, and these conditional ones.
"""

from __future__ import annotations

import fnmatch
import io
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import UsageError
from pipeline.redaction import without_credentials
from pipeline.write.request import FINAL, pauses, persistently, translated

log = logging.getLogger(__name__)

Read = TypeVar("Read")

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """As os.stat_result, of an object."""

    st_size: int
    st_mtime: float  # by the store's clock, which all workers share


class ObjectPath:
    """An object, or the folder of those whose names begin with it. Not opened, not looked at: a name.

    Args:
        url: with its scheme; a slash at the end means nothing.

    Raises:
        UsageError: nothing that is installed reads such URLs.
    """

    __slots__ = ("_files", "_listed", "_path", "_scheme")

    def __init__(self, url: str) -> None:
        import fsspec

        self._scheme = url.partition("://")[0]
        try:
            # A listing that is kept would hide what others publish.
            self._files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as problem:
            extra = _EXTRAS.get(self._scheme)
            how = f"pip install 'vlm-batch[{extra}]'" if extra else "install the package that the message names"
            raise UsageError(f"{without_credentials(url)}: {problem}. To use such addresses, {how}.") from None
        except ValueError as problem:
            raise UsageError(
                f"{without_credentials(url)}: {problem}. Expected a folder, or a URL that fsspec knows."
            ) from None
        self._path = str(path).rstrip("/")
        self._listed: ObjectStat | None = None

    def _at(self, path: str, listed: ObjectStat | None = None) -> ObjectPath:
        other = object.__new__(ObjectPath)
        other._scheme, other._files, other._path, other._listed = self._scheme, self._files, path, listed
        return other

    def __truediv__(self, name: str) -> ObjectPath:
        return self._at(f"{self._path}/{name}")

    def __str__(self) -> str:
        return f"{self._scheme}://{self._path.lstrip('/')}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and (self._scheme, self._path) == (other._scheme, other._path)

    def __hash__(self) -> int:
        return hash((self._scheme, self._path))

    def __lt__(self, other: ObjectPath) -> bool:
        return self._path < other._path

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    @property
    def parent(self) -> ObjectPath:
        return self._at(self._path.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    # What is there

    def stat(self) -> ObjectStat:
        """Size and date.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return self._listed or _stat(self._info())

    def exists(self) -> bool:
        """Whether the object is there; a folder as such never is."""
        try:
            return bool(self._info()["type"] == "file")
        except FileNotFoundError:
            return False

    def is_file(self) -> bool:
        return self._listed is not None or self.exists()

    def is_dir(self) -> bool:
        """Never: there are no folders here, only names with slashes."""
        return False

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Objects right in this folder whose names match, in order; `*` and `?` alone are special."""
        prefix = re.split(r"[*?]", pattern, maxsplit=1)[0]

        def listed() -> dict[str, Any]:
            self._files.invalidate_cache(self._path)
            found: dict[str, Any] = self._files.find(
                self._path, maxdepth=1, detail=True, **_prefix(self._files, prefix)
            )
            return found

        try:
            found = persistently(listed)
        except FileNotFoundError:
            return
        for path, info in sorted(found.items()):
            if info["type"] == "file" and fnmatch.fnmatchcase(path.rpartition("/")[2], pattern):
                yield self._at(path, _stat(info))

    def read_bytes(self) -> bytes:
        """The content.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        return bytes(persistently(lambda: self._files.cat_file(self._path)))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def read_tail(self, num_bytes: int) -> bytes:
        """The last bytes, in one request; all of them where there are fewer.

        Raises:
            OSError: it is not there, or cannot be read.
        """

        def tail() -> bytes:
            try:
                return bytes(self._files.cat_file(self._path, start=-num_bytes))
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:  # some stores refuse more than there is
                return bytes(self._files.cat_file(self._path))[-num_bytes:]

        return persistently(tail)

    def open_read(self) -> io.BytesIO:
        """The content as a file."""
        return io.BytesIO(self.read_bytes())

    def version(self) -> str | None:
        """What tells this content from any other under the same name; None where nothing is there."""
        try:
            info = self._info()
        except FileNotFoundError:
            return None
        for name in ("ETag", "generation", "etag", "created", "mtime", "LastModified"):
            if info.get(name) is not None:
                return str(info[name])
        return str(info.get("size"))

    # What changes

    def create(self, content: bytes) -> bool:
        """Put the object where none is; False where another one is there, which stays.

        Raises:
            OSError: it cannot be written, or nothing can be learnt about it.
        """
        return self._settled(content, lambda: self._put(content, mode="create"))

    def replace(self, content: bytes) -> None:
        """Put the object, whatever is there.

        Raises:
            OSError: it cannot be written.
        """
        persistently(lambda: self._put(content))

    def upload(self, path: Path) -> None:
        """Put what a file holds, whatever is there; a large one in parts.

        Raises:
            OSError: the file cannot be read, or the object cannot be written.
        """
        persistently(lambda: self._files.put_file(str(path), self._path))

    def exchange(self, content: bytes, version: str | None) -> bool:
        """Put the object in the place of that version; False where it is another by now, which stays.

        Stores other than S3 compare first and put then: of two at the same moment both may win there.

        Raises:
            OSError: as create().
        """
        if version is None:
            return self.create(content)
        if self._scheme in ("s3", "s3a"):
            try:
                return self._settled(content, lambda: self._put(content, IfMatch=version))
            except FileNotFoundError:  # deleted meanwhile
                return False
        if self.version() != version:
            return False
        self.replace(content)
        return True

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object.

        Raises:
            FileNotFoundError: it is not there, the store says so, and that matters.
        """
        try:
            persistently(lambda: self._files.rm_file(self._path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there when something is in it."""

    def rmdir(self) -> None:
        """Nothing, as mkdir()."""

    def _info(self) -> dict[str, Any]:
        found: dict[str, Any] = persistently(lambda: self._files.info(self._path))
        return found

    def _put(self, content: bytes, **how: str) -> None:
        self._files.pipe_file(self._path, content, **how)

    def _settled(self, content: bytes, put: Callable[[], None]) -> bool:
        """Whether a conditional put has the object be `content`, even where its reply was lost on the way.

        A client sends a request again that it got no reply to, so that our own object may be what is in the way.
        """
        waiting = pauses()
        while True:
            try:
                translated(put)
                return True
            except FileExistsError:
                return self._holds(content)
            except FINAL:
                raise
            except OSError as problem:
                log.debug("%s: %s; looking whether it is there", self, problem)
                if not next(waiting, False):
                    raise
            if self._holds(content):
                return True  # else it is not there, or another one is: the condition of the next try says which

    def _holds(self, content: bytes) -> bool:
        try:
            return self.read_bytes() == content
        except FileNotFoundError:
            return False


def _stat(info: dict[str, Any]) -> ObjectStat:
    dated: Any = next((info[name] for name in ("LastModified", "updated", "mtime", "created") if info.get(name)), 0.0)
    return ObjectStat(int(info["size"]), dated.timestamp() if isinstance(dated, datetime) else float(dated))


def _prefix(files: Any, prefix: str) -> dict[str, str]:
    """How a file system is asked for names with a prefix; others list all, and names are matched here."""
    return {"prefix": prefix} if prefix and type(files).__name__ in ("S3FileSystem", "GCSFileSystem") else {}

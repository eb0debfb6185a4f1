"""Samples of a webdataset tar: members side by side whose names agree up to the first dot. Nothing is extracted.

A name is only a key: links, devices, absolute names and names with .. are passed over. What Python would have to
unpickle is never read.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

IMAGES = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm", "pbm", "pnm"])
NUMBERS = frozenset(["cls", "cls2", "index", "inx"])
TEXTS = frozenset(["txt", "text", "caption", "transcript", "url", "html", "md", "xml", "csv", "tsv", "id"]) | NUMBERS
MAX_MEMBER_BYTES = 1 << 30
_NAME = re.compile(r"((?:.*/|)[^./][^./]*)[.]([^/]+)", re.DOTALL)  # webdataset's rule: key, dot, extension


@dataclass(slots=True)
class Sample:
    """One sample: the byte its first member starts at, and its members' data (None = not asked for) in order."""

    key: str
    offset: int
    members: list[tuple[str, bytes | None]] = field(default_factory=list)
    fault: tuple[str, str] | None = None  # kind and message: the sample is torn, or what stands here is no member


def is_tar(path: str) -> bool:
    return path.lower().endswith((".tar", ".tar.gz", ".tgz"))


def suffix(extension: str) -> str:
    """The last part of an extension, which tells the kind of data: png of left.png."""
    return extension.rpartition(".")[2]


def samples(
    handle: IO[bytes], path: str, offset: int, wanted: Callable[[int, str], bool], notes: Counter[str] | None = None
) -> Iterator[Sample]:
    """The samples from byte `offset` on, which is 0 or the offset of a sample (uncompressed bytes in a .tgz).

    wanted: whether to read a member's data, from the sample's number in this call and the extension.
    notes: counts what was passed over, by reason.
    A tar that ends too early, or has no header where one must be, ends in a sample with a fault.
    """
    notes = Counter() if notes is None else notes
    stream: Any = gzip.GzipFile(fileobj=handle) if path.lower().endswith("gz") else handle
    sample: Sample | None = None
    number = -1
    try:
        for member in _members(stream, offset, notes):
            name = _key_and_extension(member, notes)
            if name is None:
                continue
            key, extension = name
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample, number = Sample(key, member.offset), number + 1
            if any(extension == other for other, _ in sample.members):
                sample.fault = ("DuplicateMember", f"{key} has two members .{extension}")
            if suffix(extension) not in IMAGES | TEXTS | {"json"}:
                notes[f".{extension} members passed over: neither images, text nor JSON"] += 1
                continue
            data = None
            if wanted(number, extension):
                if member.size > MAX_MEMBER_BYTES:
                    sample.fault = ("MemberTooLarge", f"{member.name} has {member.size} bytes")
                else:
                    stream.seek(member.offset_data)
                    data = stream.read(member.size)
                    if len(data) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
            sample.members.append((extension, data))
    except _NoHeader as error:
        if sample is not None:
            yield sample
        sample = Sample(f"@{error.offset}", error.offset, fault=("DamagedTar", f"no tar header at byte {error.offset}"))
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, MemoryError) as error:
        sample = sample or Sample(f"@{offset}", offset)
        sample.members, sample.fault = [], ("DamagedTar", f"{error}; what follows in the tar is lost")
    if sample is not None:
        yield sample


class _NoHeader(Exception):
    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


def _members(stream: Any, offset: int, notes: Counter[str]) -> Iterator[tarfile.TarInfo]:
    stream.seek(offset)
    archive: Any = tarfile.TarFile(fileobj=stream, mode="r")
    last = -1
    while (member := archive.next()) is not None:
        if member.offset <= last or member.size < 0:  # a forged size that leads back for ever
            raise _NoHeader(member.offset)
        last = member.offset
        archive.members = []  # tarfile would remember every member
        yield member
    # tarfile takes a damaged header for the end; the true end is the end of the file or a block of zeros.
    stream.seek(archive.offset)
    block = stream.read(512)
    if not block:
        notes["tar without an end mark: it may be cut short"] += 1
    if any(block):
        raise _NoHeader(archive.offset)


def _key_and_extension(member: tarfile.TarInfo, notes: Counter[str]) -> tuple[str, str] | None:
    name = member.name.removeprefix("./")
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        notes["links, devices and sparse members passed over"] += 1
    elif name.startswith("/") or ".." in name.split("/"):
        notes["members with absolute names or .. passed over"] += 1
    elif (match := _NAME.fullmatch(name)) is None or name.rpartition("/")[2].startswith("__"):
        notes["members without an extension, or hidden, passed over"] += 1
    else:
        return match[1].encode("utf-8", "backslashreplace").decode(), match[2].lower()
    return None

"""One cell of a table: the images, or the conversation, that it stands for. Nothing is opened here."""

from __future__ import annotations

import base64
import binascii
import json
import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from pipeline.dataset.files import is_local, joined, local_path
from pipeline.errors import RowFault, UsageError
from pipeline.records import ImageRef, Stage
from pipeline.redaction import redacted

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://|(?:file|ftp|javascript|pipe):|.*::", re.IGNORECASE | re.DOTALL)
_MAX_PATH = 4096


@dataclass(frozen=True, slots=True)
class Origin:
    """Where image paths found in rows lead."""

    folder: str  # that relative paths start from: absolute path or fsspec URL
    confined: bool = False  # dataset.root is set: nothing outside `folder`
    allow_urls: bool = False


def origin(root: str | None, folder: str, allow_urls: bool) -> Origin:
    """The origin that dataset.root asks for; `folder` where it is null.

    Raises:
        UsageError: root is no folder.
    """
    if root is None:
        return Origin(folder, False, allow_urls)
    if is_local(root):
        root = os.path.realpath(local_path(root))
        if not os.path.isdir(root):
            raise UsageError(f"dataset.root={root} is not a folder.")
    return Origin(root, True, allow_urls)


def images_in(cell: Any, origin: Origin) -> tuple[ImageRef, ...]:
    """The images of a cell: bytes, {bytes, path}, a path, a data URI, a URL, or a list of these, in order.

    Raises:
        RowFault: a null, a path that leaves dataset.root, a URL that is not allowed, or no image at all.
    """
    if isinstance(cell, list | tuple):
        return tuple(image for part in cell for image in images_in(part, origin))
    if isinstance(cell, bytes | bytearray | memoryview):
        return (ImageRef(data=bytes(cell)),)
    if isinstance(cell, dict) and ("bytes" in cell or "path" in cell):
        data = cell.get("bytes")
        return images_in(data if isinstance(data, bytes) else cell.get("path"), origin)
    if cell is None or cell == "":
        raise _fault("NullImage", "the image is null or empty")
    if not isinstance(cell, str):
        raise _fault("NoImage", f"a value of type {type(cell).__name__} is no image; expected bytes, a path or a URL")
    if cell[:5].lower() == "data:":
        return (ImageRef(data=_data_of(cell)),)
    return (ImageRef(path=_path_of(cell, origin)),)


def holds_data_uri(cell: Any) -> bool:
    """Whether a cell carries a picture as text."""
    if isinstance(cell, list | tuple):
        return any(map(holds_data_uri, cell))
    return isinstance(cell, str) and cell[:5].lower() == "data:"


def messages_in(cell: Any) -> tuple[Mapping[str, Any], ...]:
    """The conversation of a cell: a list of {role, content}, or its JSON text.

    Raises:
        RowFault: it is null or something else.
    """
    if cell is None:
        raise _fault("NullMessages", "the conversation is null")
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise _fault("BadMessages", f"the conversation is no JSON: {error}") from error
    turns = _without_nulls(cell)
    if not isinstance(turns, list) or not turns:
        raise _fault("BadMessages", "expected a conversation as a list of {role, content}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise _fault("BadMessages", f"turn {number} of the conversation is not {{role, content}}")
    return tuple(turns)


def _without_nulls(value: Any) -> Any:
    # A struct column has every field in every row: {"type": "text", "text": "Hi", "image": null}.
    if isinstance(value, list | tuple):
        return [_without_nulls(part) for part in value]
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return value


def _data_of(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise _fault("BadDataUri", f"a data URI without a comma: {_short(uri)}")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _fault("BadDataUri", f"the base64 text of {_short(uri)} is damaged: {error}") from error


def _path_of(text: str, origin: Origin) -> str:
    if text[:8].lower().startswith(("http://", "https://")):
        if origin.allow_urls and "::" not in text:  # "::" would chain file systems
            return text
        raise _fault("UrlsNotAllowed", f"{_short(text)} is a URL, and images are not fetched from the web")
    if _SCHEME.match(text):
        raise _fault("UrlsNotAllowed", f"{_short(text)}: only paths, http(s) URLs and data URIs are read from rows")
    if len(text) > _MAX_PATH or "\0" in text:
        raise _fault("BadPath", f"{_short(text)} is no path; base64 text needs data:image/...;base64, before it")
    if not is_local(origin.folder):
        return _remote_path_of(text, origin)
    path = os.path.join(origin.folder, text)
    if not origin.confined:
        return os.path.normpath(path) if ".." not in text else path  # a/../b is not b where a is a link
    real = os.path.realpath(path)
    if os.path.commonpath([real, origin.folder]) != origin.folder:
        raise _fault("PathOutsideRoot", f"{_short(text)} leads out of dataset.root={origin.folder}")
    return real


def _remote_path_of(text: str, origin: Origin) -> str:
    if text.startswith("/") and not origin.confined:
        return text
    path = posixpath.normpath(text)
    if path.startswith(("/", "../")) or path == "..":
        raise _fault("PathOutsideRoot", f"{_short(text)} leads out of {origin.folder}")
    return joined(origin.folder, path)


def _short(text: str) -> str:
    text = redacted(text[:_MAX_PATH])  # before it is shortened further: half a secret is not known for one
    return text if len(text) <= 80 else text[:77] + "..."


def _fault(kind: str, message: str) -> RowFault:
    return RowFault(Stage.READ, kind, message)

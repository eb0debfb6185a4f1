"""Names of files: natural order, globs, braces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_DIGITS = re.compile("[0-9]+")
_MAGIC = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")


def natural_key(path: str) -> str:
    """Sort key under which img2 comes before img10 and a folder's files stay together."""
    # A number becomes its count of digits and its digits: numbers of equal length compare as text.
    return _DIGITS.sub(_number_key, path).replace("/", "\0")


def _number_key(match: re.Match[str]) -> str:
    digits = match[0].lstrip("0")
    return f"{len(digits)}{digits}" if len(digits) < 9 else f"9{len(digits):09d}{digits}"


def is_pattern(path: str) -> bool:
    """Whether a path has a character of globs or braces."""
    return _MAGIC.search(path) is not None


def brace_words(pattern: str) -> Iterator[str]:
    """Every name that {a,b} and {000..010} stand for, in order."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    ends = _RANGE.fullmatch(match[1])
    choices: Iterable[str] = match[1].split(",")
    if ends:
        width = len(ends[1]) if ends[1].startswith("0") else 0
        choices = (f"{number:0{width}d}" for number in range(int(ends[1]), int(ends[2]) + 1))
    for choice in choices:
        yield from brace_words(pattern[: match.start()] + choice + pattern[match.end() :])


def glob_regex(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression over a relative path: * and ? stay inside a folder, ** crosses folders."""
    parts: list[str] = []
    position = 0
    while position < len(pattern):
        rest = pattern[position:]
        closing = rest.find("]", 2) if rest.startswith("[") else -1
        if rest.startswith("**/"):
            parts.append("(?:[^/]+/)*")
            position += 3
        elif rest.startswith("**"):
            parts.append(".*")
            position += 2
        elif closing > 0:
            body = re.escape(rest[1:closing]).replace(r"\-", "-").replace(r"\!", "!").replace(r"\^", "^")
            parts.append(f"[^{body[1:]}]" if body[0] in "!^" else f"[{body}]")
            position += closing + 1
        else:
            parts.append({"*": "[^/]*", "?": "[^/]"}.get(rest[0], re.escape(rest[0])))
            position += 1
    return re.compile("".join(parts), re.DOTALL)

"""Text of ours that quotes names, rows or libraries, as it may be shown."""

from __future__ import annotations

import re

from pipeline.redaction import redacted

# C0 but newline and tab, DEL, C1: what starts an escape sequence, moves the cursor or rings. Surrogates: no encoding
# takes them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with control characters as escapes: \x1b instead of an escape character."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shown(text: str) -> str:
    """Without secrets, and unable to steer a terminal."""
    return printable(redacted(text))

"""Text of rows, models and files as a page shows it: never markup, never a secret, and nothing in it unseen."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from pipeline.redaction import redacted

# Control characters but newline and tab; what turns the direction of text (a file name can read backwards); what has no
# width; tags, in which text can hide; half characters. Joiners (U+200C, U+200D) stay: scripts and emoji need them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]+"
)


def visible(text: str) -> Markup:
    r"""The text as HTML, with what cannot be seen as marked escapes: \u202e for what turns the direction of text."""
    # Of what escape() gives, only text is left to be looked at; the names of characters are ASCII without markup.
    return Markup(
        _UNSEEN.sub(lambda match: f'<span class="unseen">{_named(match[0])}</span>', str(escape(redacted(text))))
    )


def attribute(text: str) -> Markup:
    """The text as an attribute takes it, where there can be no marks: on one line, escapes as they are."""
    return escape(_UNSEEN.sub(lambda match: _named(match[0]), redacted(text)).replace("\n", " "))


def _named(characters: str) -> str:
    return characters.encode("unicode_escape").decode()

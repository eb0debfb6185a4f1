"""A record as a page shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.page.pictures import Picture
from pipeline.page.visible import visible

_HEAD_CHARACTERS = 280  # what is seen of a text without unfolding it
_LEAST_CHARACTERS = 100  # of a text, however full the page is


@dataclass(frozen=True, slots=True)
class Text:
    """A text, of which a page shows the head and folds the rest."""

    head: str
    rest: str
    num_left_out: int  # characters behind the rest, which the page does not hold

    @property
    def num_characters(self) -> int:
        return len(self.head) + len(self.rest) + self.num_left_out

    @property
    def is_folded(self) -> bool:
        return bool(self.rest or self.num_left_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A record with its pictures."""

    id: str
    pictures: Sequence[Picture] = ()
    num_more_pictures: int = 0
    note: str = ""  # above the texts: how many others say the same
    prompt: Text | None = None
    answer: Text | None = None
    error_kind: str = ""  # stage/type
    error: Text | None = None
    facts: Sequence[str] = ()  # finish reason, tokens, size of the pictures
    columns: Sequence[tuple[str, str]] = ()  # of the input, as text


class Room:
    """How many characters of HTML a page still has for the texts of records: each takes of it, and is cut to what is
    left."""

    def __init__(self, num_characters: int, each: int = 10_000) -> None:
        self._left, self._each = num_characters, each

    def text(self, text: str, head: int = _HEAD_CHARACTERS) -> Text:
        """A text, folded behind its first `head` characters or so."""
        kept = text[: max(_LEAST_CHARACTERS, min(self._each, self._left))]
        size = len(visible(kept))  # an invisible character takes forty
        if size > self._left:
            kept = kept[: max(_LEAST_CHARACTERS, len(kept) * max(0, self._left) // size)]
            size = len(visible(kept))
        self._left -= size
        if len(kept) == len(text) and len(text) <= head * 5 // 4:  # nobody unfolds a text for three words
            return Text(text, "", 0)
        border = max(kept.rfind(" ", head * 3 // 4, head), kept.rfind("\n", head * 3 // 4, head))
        border = border if border > 0 else head
        return Text(kept[:border], kept[border:], len(text) - len(kept))

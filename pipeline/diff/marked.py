"""Two texts beside each other, the words that differ marked; of what is equal in long ones little is shown."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.diff.similarity import Span, spans

_SHORT_CHARACTERS = 1500  # a text of no more is shown whole
_AROUND_CHARACTERS = 160  # of an equal stretch, before and behind what differs


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a text; or, where num_left_out is not 0, so many characters that are not shown."""

    text: str
    changed: bool = False
    num_left_out: int = 0


def marked(a: str, b: str, most: int) -> tuple[list[Part], list[Part]]:
    """The parts of both texts. most: characters of each that are shown."""
    left, right = spans(a, b)
    return _parts(left, len(a), most), _parts(right, len(b), most)


def plain(text: str, most: int) -> list[Part]:
    """A text with nothing beside it."""
    return _parts([Span(text, False)], len(text), most) if text else []


def _parts(found: list[Span], num_characters: int, most: int) -> list[Part]:
    parts: list[Part] = []
    left, seen = most, 0
    whole = num_characters <= min(_SHORT_CHARACTERS, most)
    for number, span in enumerate(found):
        text = span.text
        if not whole and not span.changed and len(found) > 1:
            head = text[:_AROUND_CHARACTERS] if number else ""
            tail = text[-_AROUND_CHARACTERS:] if number + 1 < len(found) else ""
            if len(head) + len(tail) + _AROUND_CHARACTERS < len(text):
                parts += [Part(head)] if head else []
                parts += [Part("", num_left_out=len(text) - len(head) - len(tail)), *([Part(tail)] if tail else [])]
                left, seen = left - len(head) - len(tail), seen + len(text)
                continue
        parts.append(Part(text[: max(0, left)], span.changed))
        shown = len(parts[-1].text)
        left, seen = left - shown, seen + shown
        if left <= 0:
            break
    if seen < num_characters:
        parts.append(Part("", num_left_out=num_characters - seen))
    return parts

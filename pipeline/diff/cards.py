"""Records side by side as the page shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.diff.marked import Part, marked, plain
from pipeline.diff.pictures import PairPictures, Row
from pipeline.diff.side import Side
from pipeline.redaction import redacted

ERROR = "diff.error"  # in a row: the class of its error, None where it has an answer
_MOST_CHARACTERS = 600  # of a prompt, a reference or a title


@dataclass(frozen=True, slots=True)
class Half:
    """A record of one side."""

    parts: Sequence[Part]  # of the answer, or of the message of its error
    error: str | None  # class; None = answered
    prompt: str  # empty where both sides were asked the same
    facts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Card:
    """A record of both sides, or of one: None = that side has not got it."""

    title: str
    facts: Sequence[str]
    prompt: str  # that both were asked; empty where they differ
    reference: str
    pictures: PairPictures
    a: Half | None
    b: Half | None


def card(
    sides: tuple[Side, Side],
    rows: tuple[Row | None, Row | None],
    key_columns: tuple[str, str],
    *,
    facts: Sequence[str],
    half_facts: tuple[Sequence[str], Sequence[str]],
    reference: str,
    pictures: PairPictures,
    most: int,
) -> Card:
    """A record as a card.

    facts: of the record; half_facts: of each side. most: characters of an answer that are shown.
    """
    answers = _answers(sides, rows, most)
    prompts = ["" if row is None else _cut(row.get("prompt") or "") for row in rows]
    same_prompt = prompts[0] == prompts[1] or None in rows
    halves = [
        None if row is None else Half(parts, row[ERROR], "" if same_prompt else prompt, [*_ending(row), *more])
        for row, parts, prompt, more in zip(rows, answers, prompts, half_facts, strict=True)
    ]
    row, column = next((row, column) for row, column in zip(rows, key_columns, strict=True) if row is not None)
    return Card(
        title=_cut(str(row[column])),
        facts=facts,
        prompt=prompts[0] or prompts[1] if same_prompt else "",
        reference=_cut(reference),
        pictures=pictures,
        a=halves[0],
        b=halves[1],
    )


def _answers(sides: tuple[Side, Side], rows: tuple[Row | None, Row | None], most: int) -> Sequence[Sequence[Part]]:
    # Secrets go before the texts are taken apart: in parts nobody would know them.
    texts = [None if row is None else redacted(_said(side, row)) for side, row in zip(sides, rows, strict=True)]
    if texts[0] is not None and texts[1] is not None and not any(row and row[ERROR] for row in rows):
        return marked(texts[0], texts[1], most)
    return [plain(text or "", most) for text in texts]


def _said(side: Side, row: Row) -> str:
    """The answer, or the message of the error in its place."""
    value = row.get("error_message") if row[ERROR] else row[side.response]
    return "" if value is None else str(value)


def _ending(row: Row) -> list[str]:
    tokens = row.get("num_generated_tokens")
    return [
        *([row["finish_reason"]] if row.get("finish_reason") else []),
        *([f"{tokens:,} tokens"] if tokens is not None else []),
    ]


def _cut(text: str) -> str:
    text = redacted(text)  # before it is cut: half a secret would not be known for one
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."

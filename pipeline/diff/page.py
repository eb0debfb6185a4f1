"""The page of changed records side by side: diff.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.diff.cards import ERROR, Card, card
from pipeline.diff.change import Change
from pipeline.diff.comparison import Comparison, error_classes
from pipeline.diff.lines import beyond_chance, figure, share_same, signed
from pipeline.diff.pairs import records_at
from pipeline.diff.pictures import IMAGE_COLUMNS, Row, pair_pictures
from pipeline.diff.rows import identity_columns
from pipeline.diff.scores import Scores
from pipeline.diff.selection import Selection, selections
from pipeline.diff.side import Side
from pipeline.page.document import number, percent, rendered

Pair = tuple[Row | None, Row | None]

_TEMPLATE = Path(__file__).with_name("page.html")
_NUM_CHARACTERS = 2_500_000  # of all answers on the page
_MOST_CHARACTERS, _LEAST_CHARACTERS = 6000, 400  # of one
_MOST_BARS = 12
_MOST_GROUPS = 50  # of a table by the values of a column; diff.json has all


@dataclass(frozen=True, slots=True)
class Group:
    """Records with the same outcome."""

    name: str
    title: str
    note: str
    num_all: int
    cards: Sequence[Card]


def diff_page(
    a: Side,
    b: Side,
    comparison: Comparison,
    found: Mapping[str, Any],
    scores: Scores | None,
    *,
    most: int,
    seed: int,
    root: str | None,
) -> str:
    """The page as HTML.

    found: of summary(). most: records on it. seed: of what is drawn. root: folder or URL that the pictures lie in now.

    Raises:
        RunFailed: a file cannot be read.
    """
    chosen = selections(comparison, scores, most, seed)
    pairs = [_pairs(a, b, comparison, scores, selection) for selection in chosen]
    pictures = iter(pair_pictures(a, b, [pair for group in pairs for pair in group], root))
    by_prompt = "prompt_name" in comparison.pairs.key
    num_texts = 2 * sum(len(selection.numbers) for selection in chosen)
    most_characters = max(_LEAST_CHARACTERS, min(_MOST_CHARACTERS, _NUM_CHARACTERS // max(1, num_texts)))
    groups = []
    for selection, group in zip(chosen, pairs, strict=True):
        by_record = scores.of_records(selection.numbers) if scores and not selection.kind.is_alone else {}
        cards = [
            card(
                (a, b),
                pair,
                comparison.pairs.key_columns,
                facts=[*_names(pair, by_prompt), *_similarity(comparison, selection, place)],
                half_facts=by_record.get(place, ([], [])),
                reference=" | ".join(scores.source.of_rows(*pair)) if scores else "",
                pictures=next(pictures),
                most=most_characters,
            )
            for place, pair in zip(selection.numbers.tolist(), group, strict=True)
        ]
        groups.append(
            Group(selection.kind.name, selection.kind.title, _note(selection), len(selection.kind.numbers), cards)
        )
    num = max(1, found["num_records"])
    return rendered(
        _TEMPLATE,
        found=found,
        outcomes=[
            (change.doc, found["changes"][change.word] / num, number(found["changes"][change.word]))
            for change in Change
            if found["changes"][change.word]
        ],
        endings=_crossed(found["finish_reasons"]),
        errors=_crossed(found["errors"]),
        chips=[(group.name, group.title, group.num_all) for group in groups],
        groups=groups,
        most_groups=_MOST_GROUPS,
        share_same=share_same,
        beyond_chance=beyond_chance,
        figure=figure,
        signed=signed,
    )


def _pairs(a: Side, b: Side, comparison: Comparison, scores: Scores | None, selection: Selection) -> list[Pair]:
    """The records of a selection, as rows of both sides."""
    pairs, kind, numbers = comparison.pairs, selection.kind, selection.numbers
    more = scores.columns if scores else ([], [])
    left = None if kind.change is Change.ONLY_IN_B else numbers if kind.is_alone else pairs.a[numbers]
    right = None if kind.change is Change.ONLY_IN_A else numbers if kind.is_alone else pairs.b[numbers]
    return list(
        zip(
            _rows(a, pairs.a_starts, left, len(numbers), [*identity_columns(a, pairs.key_columns[0]), *more[0]]),
            _rows(b, pairs.b_starts, right, len(numbers), [*identity_columns(b, pairs.key_columns[1]), *more[1]]),
            strict=True,
        )
    )


def _rows(side: Side, starts: Any, places: Any, num: int, columns: Sequence[str]) -> Sequence[Row | None]:
    if places is None:
        return [None] * num
    images = [name for name in IMAGE_COLUMNS if side.results.plan is not None]
    asked = list(dict.fromkeys([*columns, side.response, *side.compared, *images]))
    table = records_at(side, starts, places, asked)
    return [row | {ERROR: kind} for row, kind in zip(table.to_pylist(), error_classes(table, side), strict=True)]


def _crossed(counts: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """Bars of (class in a, class in b)."""
    whole = max(1, sum(entry["num_records"] for entry in counts))
    return [
        (
            f"{entry['a'] or 'answered'} to {entry['b'] or 'answered'}",
            entry["num_records"] / whole,
            number(entry["num_records"]),
        )
        for entry in counts[:_MOST_BARS]
    ]


def _names(pair: Pair, by_prompt: bool) -> list[str]:
    """Prompt and sample of a record, where there are several."""
    row = next(row for row in pair if row is not None)
    prompts = [f"prompt {row['prompt_name']}"] if by_prompt else []
    return [*prompts, *([f"sample {row['sample_index']}"] if row.get("sample_index") else [])]


def _similarity(comparison: Comparison, selection: Selection, place: int) -> list[str]:
    if selection.kind.is_alone or np.isnan(comparison.similarity[place]):
        return []
    return [f"{percent(float(comparison.similarity[place]))} alike"]


def _note(selection: Selection) -> str:
    shown, num_all, num_least = len(selection.numbers), len(selection.kind.numbers), selection.num_least_alike
    if shown == num_all:
        return ""
    how = f"the {num_least:,} least alike, and {shown - num_least:,} of the others" if num_least else f"{shown:,}"
    return f"{how}, drawn at random from {num_all:,}; html_rows= shows more"

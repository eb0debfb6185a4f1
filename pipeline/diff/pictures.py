"""The pictures of pairs: those of a, and those of b too where it was asked about others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.diff.side import Side
from pipeline.page.pictures import Asked, Limits, Picture, pictures_of

Row = Mapping[str, Any]  # of a side, by our names

IMAGE_COLUMNS = ("image_sha256", "image_width", "image_height")
_NUM_BYTES = 4_000_000  # of each side's


@dataclass(frozen=True, slots=True)
class PairPictures:
    """What a card shows: the pictures that both were asked about, or each side's own."""

    both: Sequence[Picture] = ()
    a: Sequence[Picture] = ()
    b: Sequence[Picture] = ()


def pair_pictures(
    a: Side, b: Side, pairs: Sequence[tuple[Row | None, Row | None]], root: str | None
) -> list[PairPictures]:
    """The pictures of each pair; a record that a side has not got is None.

    root: folder or URL that the source lies in now; None = where the plans found it.
    """
    other = [one is not None and two is not None and _differ(one, two) for one, two in pairs]
    has_a, has_b = (side.results.plan is not None and "row_index" in side.results.names for side in (a, b))
    from_b = [
        two if has_b and two is not None and (differs or one is None or not has_a) else None
        for (one, two), differs in zip(pairs, other, strict=True)
    ]
    from_a = [one if has_a else None for one, _ in pairs]
    of_a, of_b = (_pictures(side, rows, root) for side, rows in ((a, from_a), (b, from_b)))
    return [
        PairPictures(a=left, b=right) if differs and left and right else PairPictures(both=left or right)
        for left, right, differs in zip(of_a, of_b, other, strict=True)
    ]


def _differ(a: Row, b: Row) -> bool:
    """Whether both are known to be about pictures, and about others."""
    one, two = a.get("image_sha256"), b.get("image_sha256")
    return bool(one and two and one != two)


def _pictures(side: Side, rows: Sequence[Row | None], root: str | None) -> Iterable[Sequence[Picture]]:
    wanted = {row["row_index"]: _asked(row) for row in rows if row is not None}
    plan = side.results.plan
    found: Mapping[int, Sequence[Picture]] = {}
    if wanted and plan is not None:
        found = pictures_of(side.results.path, plan, wanted, root=root, limits=Limits(num_bytes=_NUM_BYTES))
    return [found.get(row["row_index"], ()) if row is not None else () for row in rows]


def _asked(row: Row) -> Asked:
    sides = [length for name in ("image_width", "image_height") for length in (row[name] or [])[:1]]
    return Asked(sha256s=row["image_sha256"] or (), longest_side=max(sides, default=None))

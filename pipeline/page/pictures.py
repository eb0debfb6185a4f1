"""The pictures that rows of a run were asked about, small enough for a page."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import RunFailed, UsageError
from pipeline.page.thumbnail import Thumbnail, Thumbnails
from pipeline.plan import Plan
from pipeline.source_images import SourceImages
from pipeline.write.file import Place

MOST_PICTURES = 4  # of one record
_SMALL_PIXELS = 128  # of the longer side: shown with visible pixels
_MAX_IMAGE_PIXELS = 100_000_000  # as prompt.max_image_pixels has it


_Found = dict[int, dict[int, "Picture"]]  # by row and place in it


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a record as a page shows it: a data: URI; or, or as well, a sentence about it."""

    uri: str | None
    problem: str | None = None
    is_small: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a record says of its pictures."""

    sha256s: Sequence[str] = ()  # none where the row failed before
    longest_side: int | None = None  # pixels, of the first picture


@dataclass(slots=True, kw_only=True)
class Limits:
    """What the pictures of a page may take."""

    num_bytes: int = 5_000_000  # of the page, all of them together
    seconds: float = 60.0  # after which the rest is left out
    is_stopped: Callable[[], bool] = field(default=lambda: False)


def pictures_of(
    output_dir: Place, plan: Plan, rows: Mapping[int, Asked], *, root: str | None = None, limits: Limits | None = None
) -> dict[int, list[Picture]]:
    """Thumbnails by row; at most MOST_PICTURES of each. What cannot be shown says why in its place.

    root: folder or URL that the source lies in now; None = where the plan found it.
    """
    if plan.settings.get("dataset.image_column") is None or not rows:
        return {}
    limits = limits or Limits()
    try:
        source = SourceImages(output_dir, plan, root)
    except (RunFailed, UsageError) as problem:
        return {index: [Picture(None, f"not shown: {problem}")] for index in rows}
    found: _Found = defaultdict(dict)
    max_image_pixels = int(plan.settings.get("prompt.max_image_pixels", _MAX_IMAGE_PIXELS))
    with Thumbnails[tuple[int, int]](max_image_pixels) as thumbnails:
        num_bytes = 0
        for (index, place), thumbnail in thumbnails.made(_encoded(source, rows, found, limits)):
            num_bytes += len(thumbnail.uri or "")
            if num_bytes > limits.num_bytes:
                thumbnail = Thumbnail(None, "not shown: the page has as many pictures as it can hold")
            longest = rows[index].longest_side
            is_small = longest is not None and longest <= _SMALL_PIXELS
            found[index][place] = Picture(thumbnail.uri, thumbnail.problem, is_small)
    return {index: [picture for _, picture in sorted(places.items())] for index, places in found.items()}


def _encoded(
    source: SourceImages, rows: Mapping[int, Asked], found: _Found, limits: Limits
) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Pictures to decode, by row and place in it; of the others `found` gets why there is nothing to see."""
    recorded = {index: asked.sha256s for index, asked in rows.items()}
    order, began = sorted(rows), time.monotonic()
    for number, (index, images) in enumerate(source.of_rows(order, recorded), start=1):
        for place, image in enumerate(images[:MOST_PICTURES]):
            if image.data is None:
                found[index][place] = Picture(None, f"not shown: {image.problem}")
            elif recorded[index] and image.sha256 not in recorded[index]:
                found[index][place] = Picture(None, "changed since: the row was asked about another picture")
            else:
                yield (index, place), image.data
        if limits.is_stopped() or time.monotonic() - began > limits.seconds:
            for left in order[number:]:
                found[left][0] = Picture(None, f"not shown: reading pictures took longer than {limits.seconds:g} s")
            return

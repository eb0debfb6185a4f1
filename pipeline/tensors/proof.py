"""Whether compact images become the very tensors that a processor makes: tried on pictures, before a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from pipeline.errors import RowFault
from pipeline.records import CompactImages
from pipeline.tensors.probe import question
from pipeline.tensors.processor import Encoded, Processor
from pipeline.tensors.replay import PixelReplay, same_bits

_SIZES = ((640, 480), (200, 310), (31, 23))  # width and height: as photos are, tall, and smaller than any target


def compact_flaw(processor: Processor, replay: PixelReplay) -> str | None:
    """Why compact images must not be used with this processor on this device; None where nothing speaks against it.

    Pictures of several sizes, noise and smooth, are encoded both ways and compared bit for bit.
    """
    try:
        found = _compared(processor, replay, [*_pictures()])
        if found:
            source = found[0].recipe.sources[found[0].recipe.shown[0]]
            _compared(processor, replay, [_noise(source.width, source.height)])  # as large as it is resized to
    except _Differs as problem:
        return str(problem)
    except RowFault as fault:
        return f"it cannot be tried: {fault.message}"
    finally:
        refusals = processor.ship(processor.source.shipping)
    return None if found else "; ".join(refusals) or "its own tensors are smaller"


class _Differs(Exception):
    """Tensors of compact images are not the processor's."""


def _compared(processor: Processor, replay: PixelReplay, pictures: Sequence[Image.Image]) -> list[CompactImages]:
    """Those of the pictures that travelled compact."""
    processor.ship("processed")
    truths = [_encoded(processor, picture) for picture in pictures]
    processor.ship("decoded", at_once=True)
    compact = []
    for picture, truth in zip(pictures, truths, strict=True):
        found = _encoded(processor, picture)
        if found.compact is None:
            continue
        made = {name: torch.from_numpy(array) for name, array in found.tensors.items()}
        made |= {name: tensor.cpu() for name, tensor in replay.tensors(found.compact).items()}
        if not same_bits(made, {name: torch.from_numpy(array) for name, array in truth.tensors.items()}):
            raise _Differs(f"other tensors come out for a picture of {picture.width} x {picture.height}")
        compact.append(found.compact)
    return compact


def _encoded(processor: Processor, picture: Image.Image) -> Encoded:
    return processor.encode(question(1), [picture])


def _pictures() -> Iterator[Image.Image]:
    for number, (width, height) in enumerate(_SIZES):
        yield _smooth(width, height) if number == 1 else _noise(width, height)


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _smooth(width: int, height: int) -> Image.Image:
    return _noise(4, 4).resize((width, height), Image.Resampling.BICUBIC)

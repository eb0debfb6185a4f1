"""How a row's images travel from the worker that opened them to the engine.

processed   as the tensors that the model's processor makes
resized     as 8-bit pixels that Pillow resized: a quarter of the bytes, no arithmetic in float
decoded     as 8-bit pixels of the image itself: resized where the tensors are made
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pipeline.records import CompactImages
from pipeline.tensors.memo import ImageCall, ImageMemo

if TYPE_CHECKING:
    from pipeline.tensors.recipe import Recipe

log = logging.getLogger(__name__)

Shipping = Literal["processed", "resized", "decoded"]


class CompactShipping:
    """Puts compact images in the place of an image processor's result, where it finds a recipe that makes the result.

    at_once: look for a recipe when images of a kind are first met, not when they have become frequent.
    """

    def __init__(self, memo: ImageMemo, shipping: Shipping, *, at_once: bool = False) -> None:
        from pipeline.tensors.recording import Recorder

        self._memo, self._shipping = memo, shipping
        self._recorder: Recorder | None = None
        self.reasons: tuple[str, ...] = ()
        if memo.run is None:
            self.stop("it has no image processor of its own")
            return
        self._recorder = Recorder(memo.image_processor, memo.run, at_once=at_once)
        memo.substitute = self._stand_in

    def stop(self, reason: str) -> None:
        """From now on images travel as the processor makes them."""
        log.info("images travel as the processor makes them: %s", reason)
        self.reasons = (*self.reasons, reason)
        self._memo.substitute = self._recorder = None
        self._memo.forget()

    def refusals(self) -> tuple[str, ...]:
        """Why images, or some of them, did not travel compact."""
        return (*self.reasons, *(self._recorder.reasons if self._recorder else ()))

    def fits(self, call: ImageCall, batch: Mapping[str, Any]) -> bool:
        """Whether the prompt's tensors are what the image processor gave; where not, compact images end here.

        A processor may go on working on tensors of which only the shape is right.
        """
        if call.recipe is None or all(
            name in batch and call.made(name, batch[name]) is not None for name in call.recipe.layouts
        ):
            return True
        self.stop("the processor goes on working on what its image processor made")
        return False

    def _stand_in(self, call: ImageCall) -> tuple[Any, Recipe] | None:
        """What stands for the image processor's result, and how the result is made; None where it has to be had."""
        found = self._recorder.recipe(call) if self._recorder else None
        if found is None:
            return None
        recipe, result = found
        # Compact images are never more bytes than the tensors, as a large picture may become a small one; and resizing
        # takes less than sending four times the bytes.
        small_bytes = recipe.resized().given_bytes
        resized = self._shipping == "resized" or recipe.given_bytes > min(recipe.tensor_bytes, 4 * small_bytes)
        if resized and small_bytes > recipe.tensor_bytes:
            return None
        recipe, pixels = recipe.shipped(call.images, resized=resized)
        call.compact = CompactImages(pixels, recipe, recipe.shapes)
        return result, recipe

"""A sample as vLLM takes it: prompt tokens, what the processor made of the images, and where in the prompt they stand.

vLLM would prepare images itself, one after the other in the process that also feeds the accelerator. It takes inputs
that are prepared already, too; ours come from the worker processes. The part of vLLM that knows a model's inputs (its
multi-modal processor) still arranges them: it runs with the tensors of a sample in place of a call of transformers'
processor, and finds the images' places in the tokens as they are. Not all of that is public, so a version is pinned
(the extra `vllm`), and `check` compares the result for two pictures with what vLLM makes of them on its own.

Of the image itself vLLM then needs its size only; an array of that shape without memory of its own stands for it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.errors import RunFailed
from pipeline.records import EncodedSample

# The mean difference that two builds of one image processor (Pillow's and torchvision's) may show, of a range of 4.
_SAME_PIXELS = 0.05
_SIZES = ((96, 64), (80, 144))  # width and height of the pictures to compare with


class ProcessedInputs:
    """Makes the inputs of `LLMEngine.add_request`.

    Args:
        processor: vLLM's multi-modal processor of the model (`LLMEngine.renderer.get_mm_processor()`).
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tensors: Mapping[str, Any] | None = None
        context = processor.info.ctx
        self._postprocess = context._postprocess_output
        self._call = context.call_hf_processor
        object.__setattr__(context, "call_hf_processor", self._call_or_tensors)  # the dataclass may be frozen

    def of(self, sample: EncodedSample) -> Any:
        """The sample's input. Images with the same image_key are encoded once while vLLM remembers them.

        Raises:
            ValueError: the images of the sample are not where vLLM expects them in its tokens.
        """
        from vllm.inputs import tokens_input

        tokens = sample.tensors["input_ids"][0].tolist()
        facts = sample.facts
        if not facts.num_images:
            return tokens_input(tokens)
        key = sample.image_key or uuid.uuid4().hex
        names = [f"{key}-{number}" for number in range(facts.num_images)]
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in sample.tensors.items()}
        return self._of(tokens, tensors, list(zip(facts.image_width, facts.image_height, strict=True)), names)

    def check(self, transformers_processor: Any) -> None:
        """Compare with what vLLM makes of pictures on its own.

        Raises:
            RunFailed: this model's images are prepared in another way by vLLM.
        """
        from PIL import Image

        random = np.random.default_rng(0)
        text = self._processor.dummy_inputs.get_dummy_text({"image": 1})
        for width, height in _SIZES:
            noise = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            items = self._processor.info.parse_mm_data({"image": [picture]})
            try:
                theirs = self._processor(text, items)
                given = _processed(transformers_processor, text, picture)
                tokens = given["input_ids"][0].tolist()
                ours = self._of(tokens, given, [(width, height)], [uuid.uuid4().hex])
            except Exception as problem:  # vLLM's class of any model, with tensors that it may not expect
                raise RunFailed(_refusal(self._processor, f"{type(problem).__name__}: {_line(problem)}")) from problem
            if difference := _difference(theirs, ours):
                raise RunFailed(_refusal(self._processor, difference))

    def _of(
        self,
        tokens: list[int],
        tensors: Mapping[str, torch.Tensor],
        sizes: Sequence[tuple[int, int]],
        names: list[str],
    ) -> Any:
        from vllm.inputs import mm_input
        from vllm.multimodal.parse import parse_mm_uuids
        from vllm.multimodal.processing import ProcessorInputs, TimingContext

        processor = self._processor
        stand_ins = [np.broadcast_to(np.uint8(0), (height, width, 3)) for width, height in sizes]
        items = processor.info.parse_mm_data({"image": stand_ins})
        self._tensors = tensors
        try:
            inputs = ProcessorInputs(tokens, items, parse_mm_uuids({"image": names}))
            result = processor._apply_hf_processor(inputs, TimingContext(enabled=False))
        finally:
            self._tensors = None
        places = processor._find_mm_placeholders(tokens, result.prompt_updates)
        found, expected = len(places.get("image", ())), len(sizes)
        if found != expected or len(result.kwargs["image"]) != expected:
            raise ValueError(f"the prompt has {expected} images, and vLLM finds the tokens of {found}")
        ranges = {modality: [place.to_range() for place in each] for modality, each in places.items()}
        return mm_input(tokens, result.kwargs, result.hashes, ranges)

    def _call_or_tensors(self, *arguments: Any, **named: Any) -> Any:
        if self._tensors is None:
            return self._call(*arguments, **named)
        from transformers import BatchFeature

        return BatchFeature(self._postprocess(dict(self._tensors)))  # in the model's arithmetic


def _processed(processor: Any, text: str, picture: Any) -> dict[str, torch.Tensor]:
    try:
        found = processor(text=[text], images=[[picture]], return_tensors="pt")
    except (TypeError, ValueError):  # some take one list of images for all prompts
        found = processor(text=[text], images=[picture], return_tensors="pt")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """In what two inputs of one picture differ."""
    (place,), (own_place,) = theirs["mm_placeholders"]["image"], ours["mm_placeholders"]["image"]
    if (place.length, place.get_num_embeds()) != (own_place.length, own_place.get_num_embeds()):
        return (
            f"{place.get_num_embeds()} image tokens, where transformers' processor makes {own_place.get_num_embeds()}"
        )
    (item,), (own_item,) = theirs["mm_kwargs"]["image"], ours["mm_kwargs"]["image"]
    if item.keys() != own_item.keys():
        return f"it takes {sorted(item)}, where transformers' processor gives {sorted(own_item)}"
    for name in item:
        data, own = item[name].data, own_item[name].data
        if not isinstance(data, torch.Tensor):
            data, own = torch.as_tensor(np.asarray(data)), torch.as_tensor(np.asarray(own))
        if data.shape != own.shape or data.dtype != own.dtype:
            return f"{name} {tuple(data.shape)} {data.dtype}, where ours is {tuple(own.shape)} {own.dtype}"
        if float((data.float() - own.float()).abs().mean()) > _SAME_PIXELS:
            return f"{name} has other values"
    return None


def _refusal(processor: Any, why: str) -> str:
    return (
        f"engine=vllm cannot be fed for this model: vLLM's {type(processor).__name__} prepares a picture otherwise "
        f"than transformers' processor ({why}). Take engine=slots or engine=static."
    )


def _line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:200] or "no message"

"""Prompts into keys and values, through the model's own forward.

`generate` prepares the inputs of each architecture as it always does and hands over to us (`custom_generate`); we run
its first forward and stop. The cache is transformers' own and of full length in every layer, sliding ones too.

Shapes: B prompts, T tokens of the longest, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from pipeline.records import EncodedSample
from pipeline.vlm.base import Batcher
from pipeline.vlm.decode import last_position, seen_tokens
from pipeline.vlm.inputs import ModelInputs
from pipeline.vlm.slots.features import ImageFeatures


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A batch of prompts after its first forward."""

    decoder: Any  # the model that goes on from here: BLIP-2, say, hands generation over to its language model
    logits_BV: torch.Tensor
    layers: Sequence[Any]  # of the cache: keys and values [B, H, T, D]
    first_B: list[int]  # where each prompt begins: T less its tokens
    position: torch.Tensor  # of the last token, [..., B, 1]; more axes in front for M-RoPE
    seen_BV: torch.Tensor | None  # tokens of the prompt, where they matter


class Prefill:
    """Held by a loop. features: where encoded images come from; None lets the model encode them itself."""

    def __init__(
        self,
        model: Any,
        batcher: Batcher,
        inputs: ModelInputs,
        settings: Any,
        features: ImageFeatures | None,
        *,
        needs_history: bool,
    ) -> None:
        self._model, self._batcher, self._inputs = model, batcher, inputs
        self._settings = copy.copy(settings)
        self._settings.max_new_tokens = 1
        self._features, self._needs_history = features, needs_history

    @torch.inference_mode()
    def __call__(self, samples: Sequence[EncodedSample]) -> Prefilled:
        """Samples that fit into one padded batch.

        Raises:
            whatever the model raises.
        """
        batch = self._inputs(self._batcher.collate(samples))
        found: list[Prefilled] = []

        def first_forward(
            model: Any,
            input_ids: torch.Tensor,
            logits_processor: Any = None,
            stopping_criteria: Any = None,
            generation_config: Any = None,
            **kwargs: Any,
        ) -> torch.Tensor:
            inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
            outputs = model(**inputs, return_dict=True)
            logits_BV = outputs.logits[:, -1]
            position = last_position(inputs, len(samples))
            if position is None:
                raise NotImplementedError(f"{type(model).__name__} does not say its positions")
            layers = kwargs["past_key_values"].layers
            num_cells = layers[0].keys.shape[-2]
            seen_BV = seen_tokens(input_ids, kwargs.get("attention_mask"), logits_BV) if self._needs_history else None
            first_B = [num_cells - sample.num_tokens for sample in samples]
            found.append(Prefilled(model, logits_BV, layers, first_B, position, seen_BV))
            return input_ids

        features = self._features
        serves = features is not None and all(features.fits(sample) for sample in samples)
        with features.serving(samples) if serves and features is not None else nullcontext():
            self._model.generate(
                **batch,
                generation_config=self._settings,
                past_key_values=DynamicCache(),
                custom_generate=first_forward,
            )
        return found[0]

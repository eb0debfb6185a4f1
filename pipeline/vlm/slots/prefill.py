"""Prompts into keys and values, through the model's own forward.

`generate` prepares the inputs of each architecture as it always does and hands over to us (`custom_generate`); we run
its first forward and stop. The cache is transformers' own and of full length in every layer, sliding ones too. What
several prompts begin with is computed once, and each goes on from there.

Shapes: B prompts in F rows of the cache, T cells of the longest, H heads of keys and values, D of a head, V tokens of
the vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from pipeline.records import EncodedSample
from pipeline.vlm.base import Batcher
from pipeline.vlm.decode import last_position, seen_tokens
from pipeline.vlm.inputs import ModelInputs
from pipeline.vlm.slots.features import ImageFeatures
from pipeline.vlm.slots.final_layer import computed_at
from pipeline.vlm.slots.pool import KeysAndValues
from pipeline.vlm.slots.prefix import MAX_PACK_TOKENS, Continuation, Prefix
from pipeline.vlm.slots.prompt_attention import Way, attended, images_attended
from pipeline.vlm.slots.queue import Waiting

_MAX_TOKENS = 16_384  # of prompts at a time
_PREFIX_BYTES = 1 << 28  # of the last batch's prefixes, which the rest of a large family goes on from


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A batch of prompts after its first forward."""

    decoder: Any  # the model that goes on from here: BLIP-2, say, hands generation over to its language model
    logits_BV: torch.Tensor
    layers: Sequence[Any]  # of the cache: keys and values [F, H, T, D]
    rows: Sequence[int]  # of each prompt: in which of F it is
    spans: Sequence[tuple[int, int]]  # of each prompt: its tokens in T, padding left out
    prefixes: Sequence[Prefix | None]  # of each prompt: what comes before them
    position: torch.Tensor  # of the last token, [..., B, 1]; more axes in front for M-RoPE
    seen_BV: torch.Tensor | None  # tokens of the prompt, where they matter

    def keys_and_values(self, prompt: int) -> KeysAndValues:
        """Of a prompt, or of what comes after its prefix."""
        row, (start, stop) = self.rows[prompt], self.spans[prompt]
        return [(layer.keys[row, :, start:stop], layer.values[row, :, start:stop]) for layer in self.layers]

    def of(self, prompts: Sequence[int]) -> Prefilled:
        """The same for some of its prompts, each as often as it is named; the layers stay whole."""
        index = torch.tensor(prompts, device=self.logits_BV.device)
        return replace(
            self,
            rows=[self.rows[prompt] for prompt in prompts],
            spans=[self.spans[prompt] for prompt in prompts],
            prefixes=[self.prefixes[prompt] for prompt in prompts],
            logits_BV=self.logits_BV[index],
            position=self.position[..., index, :],
            seen_BV=None if self.seen_BV is None else self.seen_BV[index],
        )


class Prefill:
    """Held by a loop.

    features: where encoded images come from; None lets the model encode them itself.
    way: how prompts and images are attended to; by the model's own functions if not said.
    """

    def __init__(
        self,
        model: Any,
        batcher: Batcher,
        inputs: ModelInputs,
        settings: Any,
        features: ImageFeatures | None,
        *,
        needs_history: bool,
        way: Way | None = None,
    ) -> None:
        self._model, self._batcher, self._inputs = model, batcher, inputs
        self._settings = copy.copy(settings)
        self._settings.max_new_tokens = 1
        self.features, self.way, self._needs_history = features, way, needs_history
        text = model.config.get_text_config(decoder=True)
        self._takes_masks = getattr(text, "_attn_implementation", None) in ("sdpa", "eager")
        self._prefixes: dict[tuple[str, bytes], Prefix] = {}
        self.num_computed_tokens = 0  # padding included

    @torch.inference_mode()
    def __call__(self, waiting: Sequence[Waiting]) -> tuple[Prefilled, list[int]]:
        """Samples that fit into one padded batch; equal ones are computed once.

        Returns:
            the different prompts, and for each sample which of their rows is its own.

        Raises:
            whatever the model raises.
        """
        rows: dict[object, int] = {}
        different: list[Waiting] = []
        of_sample: list[int] = []
        for one in waiting:
            key = _identity(one.sample)
            if key not in rows:
                rows[key] = len(different)
                different.append(one)
            of_sample.append(rows[key])
        if different[0].num_shared:
            return self._continued(different), of_sample
        return self._whole([one.sample for one in different]), of_sample

    def _whole(self, samples: Sequence[EncodedSample]) -> Prefilled:
        features = self.features
        served = features is not None and all(features.fits(sample) for sample in samples)
        unread = features.unread(samples[0]) if features is not None and served else []
        batch = self._inputs(self._batcher.collate(samples, without=unread))
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
            with computed_at(model, [-1]), attended(model, self.way):
                logits_BV = model(**inputs, return_dict=True).logits[:, -1]
            position = last_position(inputs, len(samples))
            if position is None:
                raise NotImplementedError(f"{type(model).__name__} does not say its positions")
            layers = kwargs["past_key_values"].layers
            num_cells = layers[0].keys.shape[-2]
            self.num_computed_tokens += num_cells * len(samples)
            mask = kwargs.get("attention_mask")
            prefilled = Prefilled(
                model,
                logits_BV,
                layers,
                rows=range(len(samples)),
                spans=[(num_cells - sample.num_tokens, num_cells) for sample in samples],
                prefixes=[None] * len(samples),
                position=position,
                seen_BV=seen_tokens(input_ids, mask, logits_BV) if self._needs_history else None,
            )
            found.append(prefilled)
            return input_ids

        serving = features.serving(samples) if features is not None and served else nullcontext()
        with images_attended(self._model, self.way), serving:
            self._model.generate(
                **batch,
                generation_config=self._settings,
                past_key_values=DynamicCache(),
                custom_generate=first_forward,
            )
        return found[0]

    # Prompts with a shared prefix -------------------------------------------------------------------------------

    def _continued(self, waiting: Sequence[Waiting]) -> Prefilled:
        """Each prompt from the end of its family's prefix on."""
        prefixes = self._prefixes_of(waiting)
        decoder = prefixes[0].decoder
        rests = Continuation(
            prefixes,
            [one.sample.tensors["input_ids"][0, one.num_shared :] for one in waiting],
            max_pack_tokens=MAX_PACK_TOKENS if self._takes_masks else 0,
            pad_token_id=int(self._settings.pad_token_id or 0),
            like=prefixes[0].layers[0][0],
        )
        inputs: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(decoder.forward).parameters:
            inputs["logits_to_keep"] = torch.tensor(rests.ends, device=rests.position.device)
        with computed_at(decoder, rests.ends), attended(decoder, self.way):
            logits_FEV = decoder(
                input_ids=rests.input_ids_FR,
                attention_mask=rests.mask,
                position_ids=rests.position,
                past_key_values=rests.cache,
                use_cache=True,
                return_dict=True,
                **inputs,
            ).logits
        logits_BV = rests.at_ends(logits_FEV)
        self.num_computed_tokens += rests.num_computed_tokens
        seen_BV = None
        if self._needs_history:
            seen_BV = torch.zeros(logits_BV.shape, dtype=torch.bool, device=logits_BV.device)
            for row, one in enumerate(waiting):
                seen_BV[row, torch.from_numpy(one.sample.tensors["input_ids"][0]).to(logits_BV.device)] = True
        return Prefilled(
            decoder,
            logits_BV,
            rests.cache.layers,
            rows=rests.pack_B,
            spans=rests.spans,
            prefixes=prefixes,
            position=rests.end_position,
            seen_BV=seen_BV,
        )

    def _prefixes_of(self, waiting: Sequence[Waiting]) -> list[Prefix]:
        keys = [_prefix_key(one) for one in waiting]
        missing = {key: one for key, one in zip(keys, waiting, strict=True) if key not in self._prefixes}
        found = {key: self._prefixes[key] for key in keys if key in self._prefixes}
        if missing:
            cut = [self._batcher.cut(one.sample, one.num_shared) for one in missing.values()]
            whole = self._whole(cut)
            for row, key in enumerate(missing):
                layers = [(keys.clone(), values.clone()) for keys, values in whole.keys_and_values(row)]
                found[key] = Prefix(whole.decoder, layers, whole.position[..., row, :].clone())
        # Those of batches before are not asked for again, and their memory is at hand for what comes.
        num_bytes = sum(prefix.num_bytes for prefix in found.values())
        self._prefixes = found if num_bytes <= _PREFIX_BYTES else {}
        return [found[key] for key in keys]


def _identity(sample: EncodedSample) -> object:
    """Equal for samples that give the model equal prompts."""
    if sample.image_key is None:
        return id(sample.tensors)
    return sample.image_key, sample.tensors["input_ids"].tobytes()


def _prefix_key(one: Waiting) -> tuple[str, bytes]:
    assert one.sample.image_key is not None
    return one.sample.image_key, one.sample.tensors["input_ids"][0, : one.num_shared].tobytes()


def num_prefill_tokens(model: Any, device: torch.device) -> int:
    """Tokens of prompts to be computed at a time: enough to be busy with.

    More is no faster on a CPU, where the memory of large results is slow to get (device.keep_freed_memory).
    """
    if device.type != "cpu":
        return _MAX_TOKENS
    hidden_size = int(getattr(model.config.get_text_config(decoder=True), "hidden_size", 0) or 1024)
    return min(_MAX_TOKENS, max(512, (3 << 18) // hidden_size))

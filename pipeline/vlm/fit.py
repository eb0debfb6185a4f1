"""What a model bears, found out on the run's own samples before their batches: our decode loop, and padding.

Most models give the same logits in any batch. Some do not, although padding is masked: positions counted from the first
column (Kosmos-2), prompt tokens in front of an image that attend to the images of padding (Mllama). Others hand their
decoder inputs that our loop does not know of. One short trial of each kind finds them without knowing their names; what
fails is not used, and the run goes on more slowly.

Shapes: V tokens of the vocabulary, S steps.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pipeline.records import EncodedSample
from pipeline.vlm.answer import Generation
from pipeline.vlm.base import Batcher, EngineCounts
from pipeline.vlm.decode import DecodeLoop
from pipeline.vlm.script import Script
from pipeline.vlm.search import OwnLoop

log = logging.getLogger(__name__)

_NUM_STEPS = 4
_NUM_EXTRA_TOKENS = 7
# Of the largest logit. Over 27 tiny architectures rounding came to 2e-6 in float32, 3e-3 in float16, 2e-2 in bfloat16;
# what padding did to the three that look at it, to 1e-1 and more.
_BOUND_FLOAT32, _BOUND_HALF = 1e-4, 5e-2


class Fit:
    """Held by an engine. `own_loop`: whether the model generates by transformers' own loop instead of ours.

    model_inputs: makes of what collate gives what generate() takes.
    """

    def __init__(
        self,
        model: Any,
        batcher: Batcher,
        settings: Any,
        model_inputs: Callable[[Mapping[str, torch.Tensor]], dict[str, Any]],
        *,
        is_encoder_decoder: bool,
    ) -> None:
        self._model, self._batcher, self._model_inputs = model, batcher, model_inputs
        self._settings = copy.copy(settings)
        self._settings.max_new_tokens = _NUM_STEPS
        self._settings.num_beams = self._settings.num_return_sequences = 1
        self._settings.length_penalty = self._settings.early_stopping = None  # of a search
        self._bound = _BOUND_FLOAT32 if model.dtype == torch.float32 else _BOUND_HALF
        self._several_rows = batcher.max_rows > 1  # else nothing is ever padded
        self._tried: set[tuple[str, frozenset[str]]] = set()  # what was, on samples with which tensors
        self._seconds = 0.0
        self.own_loop = is_encoder_decoder
        batcher.pads_right = is_encoder_decoder

    def groups(self, samples: Iterator[EncodedSample]) -> Iterator[list[EncodedSample]]:
        """The batcher's groups; the first ones are tried before they are given out."""
        for group in self._batcher.groups(samples):
            yield from self._settled(group)

    def spent_seconds(self) -> float:
        """What trials took since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _settled(self, group: list[EncodedSample]) -> Iterator[list[EncodedSample]]:
        before, began = self._allowed, time.perf_counter()
        self._try(group)
        self._seconds += time.perf_counter() - began
        if self._allowed == before:
            yield group
            return
        for part in self._batcher.split(group):
            yield from self._settled(part)

    @property
    def _allowed(self) -> tuple[bool, bool]:
        return (self._batcher.may_pad_tokens, self._batcher.may_pad_images)

    def _try(self, group: Sequence[EncodedSample]) -> None:
        batcher, names = self._batcher, frozenset(group[0].shapes)  # rows without images may fare otherwise
        try:
            if ("prompt", names) not in self._tried:
                before = self._allowed
                self._try_prompt(min(group, key=lambda sample: sample.num_tokens))
                self._tried.add(("prompt", names))
                if self._allowed != before:
                    return  # the group is cut anew first
            if ("images", names) not in self._tried and batcher.may_pad_images and batcher.pads_images(group):
                self._try_images(group)
                self._tried.add(("images", names))
        except Exception as problem:  # a row may bring any model down: it meets its end in its batch, and is isolated
            log.debug("no trial with this group: %s", problem)

    def _try_prompt(self, sample: EncodedSample) -> None:
        """Our loop against transformers' own, then the sample behind (or before) columns of padding."""
        truth_SV, tokens = self._logits([sample], own_loop=True)
        if not self.own_loop:
            try:  # twice, because one of them leaves the batch earlier
                same = self._same(truth_SV, self._logits([sample, sample], tokens)[0])
            except Exception as problem:  # a model whose forward does not take what our loop gives
                log.debug("our decode loop does not fit: %s", problem)
                same = False
            if not same:
                self.own_loop = True
                log.warning("our decode loop does not fit this model; transformers' own generates (finished rows stay)")
        if not (self._several_rows and self._batcher.may_pad_tokens):
            return
        padded_SV, _ = self._logits([sample], tokens, num_extra_tokens=_NUM_EXTRA_TOKENS)
        if not self._same(truth_SV, padded_SV):
            self._batcher.may_pad_tokens = False
            log.warning("this model does not bear padded prompts: only prompts of equal length share a batch")

    def _try_images(self, group: Sequence[EncodedSample]) -> None:
        """The sample with the smallest images, alone and beside one with which they are padded."""
        by_size = sorted(group, key=lambda sample: sum(map(sum, sample.shapes.values())))
        first = by_size[0]
        other = next(sample for sample in reversed(by_size) if self._batcher.pads_images([first, sample]))
        truth_SV, tokens = self._logits([first])
        beside_SV, _ = self._logits([first, other], tokens)
        if not self._same(truth_SV, beside_SV):
            self._batcher.may_pad_images = False
            log.warning("this model does not bear padded images: only images of equal shape share a batch")

    def _same(self, truth_SV: Sequence[torch.Tensor], other_SV: Sequence[torch.Tensor]) -> bool:
        pairs = list(zip(truth_SV, other_SV, strict=True))
        return all(bool((one - other).abs().max() <= self._bound * one.abs().max()) for one, other in pairs)

    @torch.inference_mode()
    def _logits(
        self,
        samples: list[EncodedSample],
        tokens: list[int] | None = None,
        *,
        own_loop: bool | None = None,
        num_extra_tokens: int = 0,
    ) -> tuple[list[torch.Tensor], list[int]]:
        """The first sample's logits, one tensor [V] for each step, and its tokens: those given, else the likeliest."""
        batch = self._model_inputs(self._batcher.collate(samples, num_extra_tokens=num_extra_tokens))
        script = Script(tokens, self._settings.eos_token_id or [])
        generations = [Generation(sample, _NUM_STEPS if n == 0 else 2) for n, sample in enumerate(samples)]
        if self.own_loop if own_loop is None else own_loop:
            OwnLoop(generations, script.choose, needs_history=False).run(self._model, batch, self._settings)
        else:
            loop = DecodeLoop(generations, script.choose, EngineCounts(), needs_history=False)
            self._model.generate(**batch, generation_config=self._settings, custom_generate=loop)
        return script.logits_SV, script.tokens

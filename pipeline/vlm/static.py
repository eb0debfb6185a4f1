"""The static engine: padded batches of like length, from which finished rows leave.

transformers prepares inputs and cache (`generate`), and calls our loop in place of its own (`custom_generate`). It
drops finished rows from the batch with `Cache.reorder_cache`, so that a batch does not compute the tail of its slowest
row for all of them. Encoder-decoders keep transformers' loop, which asks our sampler for each token.

Shapes: B rows in the batch, T prompt tokens with padding, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pipeline.errors import Interrupted, RunFailed
from pipeline.records import Answer, EncodedSample, Fault, Stage
from pipeline.vlm.answer import Ending, Generation
from pipeline.vlm.base import Batcher, EngineCounts, StopSignal
from pipeline.vlm.load import LoadedModel
from pipeline.vlm.sampling import Sampler

log = logging.getLogger(__name__)

# Rows leave the batch when this share of it or less is still at work: moving the cache costs about a decode step.
_SHRINK_AT = 0.75
_BATCHES_UNTIL_RECOVERY = 8


class StaticEngine:
    """See the module's docstring. One engine serves one run."""

    def __init__(
        self,
        loaded: LoadedModel,
        batcher: Batcher,
        sampler: Sampler,
        ending: Ending,
        *,
        max_new_tokens: int,
        stop: StopSignal,
    ) -> None:
        self._loaded, self._model = loaded, loaded.model
        self._batcher, self._sampler, self._ending = batcher, sampler, ending
        self._max_new_tokens, self._stop = max_new_tokens, stop
        self._full_budget = (batcher.max_rows, batcher.max_tokens)
        self._num_calm_batches = 0
        self._settings = _plain_settings(loaded.model)
        self.counts = EngineCounts()

    @property
    def numerics(self) -> Mapping[str, str]:
        return {"engine": "static"} | self._loaded.numerics

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        """One answer for each sample. After a stop request no further batch begins.

        Raises:
            Interrupted: the grace period ended within a batch.
            RunFailed: the accelerator failed.
        """
        for group in self._batcher.groups(samples):
            if self._stop.requested:
                return
            for generation in self._generated(group):
                yield self._ending.answer(generation)
            self._recover()

    def _generated(self, group: Sequence[EncodedSample]) -> list[Generation]:
        """A group's generations. What fails is halved until the culprit stands alone; its neighbours are answered."""
        problem = self._attempt(generations := self._fresh(group))
        if problem is None:
            return generations
        if len(group) > 1:
            half = len(group) // 2
            return self._generated(group[:half]) + self._generated(group[half:])
        generations = self._fresh(group)
        generations[0].fault = Fault(Stage.GENERATE, *problem)
        return generations

    def _attempt(self, generations: list[Generation]) -> tuple[str, str] | None:
        """Generate; class and message of what went wrong. The exception itself would keep its tensors alive."""
        try:
            self._generate(generations)
            return None
        except (Interrupted, RunFailed):
            raise
        except Exception as problem:  # any row may bring a model down in its own way: isolated, recorded, counted
            if _is_fatal(problem):
                raise RunFailed(f"the accelerator failed and cannot go on: {problem}") from problem
            found = (type(problem).__name__, str(problem).strip().split("\n")[0] or "no message")
            out_of_memory = _is_out_of_memory(problem)
        if out_of_memory:
            self._shrink(generations)
        return found

    def _fresh(self, group: Sequence[EncodedSample]) -> list[Generation]:
        return [Generation(sample, sample.max_new_tokens or self._max_new_tokens) for sample in group]

    @torch.inference_mode()
    def _generate(self, generations: list[Generation]) -> None:
        batch = self._batcher.collate([generation.sample for generation in generations])
        batch = {name: self._moved(tensor) for name, tensor in batch.items()}
        settings = copy.copy(self._settings)
        settings.max_new_tokens = max(generation.max_new_tokens for generation in generations)
        self.counts.num_batches += 1
        self.counts.num_prompt_tokens += int(batch["attention_mask"].sum())
        self.counts.num_padded_prompt_tokens += batch["input_ids"].numel()
        if self._loaded.is_encoder_decoder:
            self._plain(generations, batch, settings)
        else:
            self._model.generate(**batch, generation_config=settings, custom_generate=_Loop(self, generations))
        self.counts.num_generated_tokens += sum(len(generation.tokens) for generation in generations)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self._loaded.device, non_blocking=True)
        return tensor.to(self._model.dtype) if tensor.is_floating_point() else tensor

    def _plain(self, generations: list[Generation], batch: dict[str, torch.Tensor], settings: Any) -> None:
        """transformers' own loop, for models whose decoder takes other inputs than ours gives."""
        settings.eos_token_id = list(self._ending.eos_ids) or None
        choice = _Choice(self, generations)
        self._model.generate(
            **batch, generation_config=settings, logits_processor=[choice], stopping_criteria=[choice.ended]
        )

    def _choose(
        self, generations: Sequence[Generation], logits_BV: torch.Tensor, seen_BV: torch.Tensor | None
    ) -> torch.Tensor:
        """Give each generation its next token, and note it in `seen_BV`."""
        samples, steps = [row.sample for row in generations], [len(row.tokens) for row in generations]
        token_B, finite_B = self._sampler.choose(logits_BV, samples, steps, seen_BV)
        if seen_BV is not None:
            seen_BV.scatter_(1, token_B[:, None], True)
        for row, token, finite in zip(generations, token_B.tolist(), finite_B.tolist(), strict=True):
            if not row.done:  # a finished row may stay in the batch for some steps
                self._ending.add(row, token, finite=finite)
        if self._stop.expired and not all(row.done for row in generations):
            raise Interrupted("the grace period ended while a batch was being answered")
        return token_B

    def _shrink(self, generations: Sequence[Generation]) -> None:
        """Budgets of half the batch that did not fit."""
        self.counts.num_out_of_memory += 1
        self._num_calm_batches = 0
        num_rows = len(generations)
        if num_rows > 1:  # a row that fits nowhere says nothing about the others
            width = max(generation.sample.num_tokens + generation.max_new_tokens for generation in generations)
            self._batcher.max_rows = num_rows // 2
            self._batcher.max_tokens = min(self._batcher.max_tokens, num_rows * width) // 2
            log.warning("out of memory with %d rows; batches shrink to %d rows", num_rows, self._batcher.max_rows)
        gc.collect()
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    def _recover(self) -> None:
        """After some batches without trouble the budget doubles, up to what was asked for."""
        if (self._batcher.max_rows, self._batcher.max_tokens) == self._full_budget:
            return
        self._num_calm_batches += 1
        if self._num_calm_batches >= _BATCHES_UNTIL_RECOVERY:
            self._num_calm_batches = 0
            self._batcher.max_rows = min(2 * self._batcher.max_rows, self._full_budget[0])
            self._batcher.max_tokens = min(2 * self._batcher.max_tokens, self._full_budget[1])


class _Loop:
    """The decode loop that `generate` calls once inputs and cache are prepared."""

    def __init__(self, engine: StaticEngine, generations: list[Generation]) -> None:
        self._engine, self._generations = engine, generations

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        engine = self._engine
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        logits_BV = model(**inputs, return_dict=True).logits[:, -1]
        cache, mask_BT = kwargs["past_key_values"], kwargs.get("attention_mask")  # no mask where nothing is padded
        rows = list(self._generations)  # of the batch, in its order
        position = _last_position(inputs, len(rows))
        seen_BV = _seen(input_ids, mask_BT, logits_BV) if engine._sampler.needs_history else None
        while True:
            token_B = engine._choose(rows, logits_BV, seen_BV)
            live = [place for place, row in enumerate(rows) if not row.done]
            if not live:
                return input_ids
            if len(live) <= _SHRINK_AT * len(rows):
                keep = torch.tensor(live, device=token_B.device)
                rows = [rows[place] for place in live]
                cache.reorder_cache(keep)
                token_B = token_B[keep]
                mask_BT = None if mask_BT is None else mask_BT[keep]
                position = None if position is None else position[..., keep, :]
                seen_BV = None if seen_BV is None else seen_BV[keep]
            step = {"input_ids": token_B[:, None], "past_key_values": cache}
            if mask_BT is not None:
                mask_BT = step["attention_mask"] = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
            if position is not None:
                position = step["position_ids"] = position + 1
            logits_BV = model(**step, use_cache=True, logits_to_keep=1, return_dict=True).logits[:, -1]
            engine.counts.num_decode_steps += 1
            engine.counts.num_decode_rows += len(rows)


class _Choice:
    """Our choice of tokens inside transformers' own loop: a logits processor that leaves it one token for each row."""

    def __init__(self, engine: StaticEngine, generations: list[Generation]) -> None:
        self._engine, self._generations = engine, generations
        self._seen_BV: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._seen_BV is None and self._engine._sampler.needs_history:
            self._seen_BV = torch.zeros_like(scores, dtype=torch.bool)  # the decoder's own tokens alone
        token_B = self._engine._choose(self._generations, scores, self._seen_BV)
        return torch.full_like(scores, -torch.inf).scatter(1, token_B[:, None], 0.0)

    def ended(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Which rows need no further token."""
        return torch.tensor([row.done for row in self._generations], device=input_ids.device)


def _last_position(inputs: Mapping[str, Any], num_rows: int) -> torch.Tensor | None:
    """The position of the last prompt token, [..., B, 1]: 2-D as a rule, with more axes in front for M-RoPE."""
    position: torch.Tensor | None = inputs.get("position_ids")
    if position is None:
        return None
    position = position[..., -1:]
    return position.expand(*position.shape[:-2], num_rows, 1) if position.shape[-2] == 1 else position


def _seen(input_ids: torch.Tensor, mask_BT: torch.Tensor | None, logits_BV: torch.Tensor) -> torch.Tensor:
    """Which tokens a row's prompt has. Padding does not count: it differs from batch to batch."""
    mask_BT = torch.ones_like(input_ids) if mask_BT is None else mask_BT
    counts_BV = torch.zeros(logits_BV.shape, dtype=torch.int32, device=logits_BV.device)
    counts_BV.scatter_add_(1, input_ids.clamp(max=logits_BV.shape[1] - 1), mask_BT.to(torch.int32))
    return counts_BV > 0


def _plain_settings(model: Any) -> Any:
    """The checkpoint's generation settings less everything about choosing tokens, which is the sampler's."""
    settings = copy.deepcopy(model.generation_config)
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "max_length"):
        if hasattr(settings, name):
            setattr(settings, name, None)
    settings.do_sample = False
    settings.num_beams = settings.num_return_sequences = 1
    settings.use_cache = True  # saved as False by many a training
    settings.cache_implementation = None  # a cache of fixed size computes over all of it
    settings.return_dict_in_generate = False
    return settings


def _is_out_of_memory(problem: Exception) -> bool:
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(sign in str(problem) for sign in signs)


def _is_fatal(problem: Exception) -> bool:
    """After these the device answers nothing more: the next rows are not at fault."""
    return not _is_out_of_memory(problem) and ("CUDA error" in str(problem) or "device-side assert" in str(problem))

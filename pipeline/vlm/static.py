"""The static engine: padded batches of like length, from which finished rows leave.

transformers prepares inputs and cache (`generate`), and calls our loop in place of its own (decode.py).
Encoder-decoders, beam searches and models that our loop does not fit (fit.py) keep transformers' loop (search.py).

Shapes: B rows in the batch, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from pipeline.errors import Interrupted, RunFailed
from pipeline.records import Answer, EncodedSample, Fault, Stage
from pipeline.vlm.answer import Ending, Generation
from pipeline.vlm.base import Batcher, EngineCounts, OnToken, StopSignal, Trace
from pipeline.vlm.choice import TokenChoice
from pipeline.vlm.decode import DecodeLoop
from pipeline.vlm.failure import described, is_out_of_memory, raise_fatal, release_memory
from pipeline.vlm.fit import Fit
from pipeline.vlm.generation import GenerationSettings
from pipeline.vlm.grammar import Grammar
from pipeline.vlm.inputs import ModelInputs, transformers_settings
from pipeline.vlm.load import LoadedModel
from pipeline.vlm.sampling import Sampler
from pipeline.vlm.search import BeamSearch, OwnLoop

log = logging.getLogger(__name__)

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
        settings: GenerationSettings,
        max_new_tokens: int,
        stop: StopSignal,
        grammar: Grammar | None = None,
    ) -> None:
        self._loaded, self._model = loaded, loaded.model
        self._settings = settings
        self._batcher, self._ending = batcher, ending
        self._choose = TokenChoice(sampler, ending, stop, grammar)
        self.max_new_tokens, self._stop = max_new_tokens, stop
        self._full_budget = (batcher.max_rows, batcher.max_tokens)
        self._num_calm_batches = 0
        self._transformers_settings = transformers_settings(loaded, settings, ending)
        self._model_inputs = ModelInputs(loaded, settings)
        self._fit = Fit(
            loaded.model,
            batcher,
            self._transformers_settings,
            self._model_inputs,
            is_encoder_decoder=loaded.is_encoder_decoder,
        )
        self.counts = EngineCounts()

    @property
    def on_token(self) -> OnToken | None:
        return self._choose.on_token

    @on_token.setter
    def on_token(self, listener: OnToken | None) -> None:
        self._choose.on_token = listener

    @property
    def numerics(self) -> Mapping[str, str]:
        return {"engine": "static", **self._choose.numerics, **self._loaded.numerics}

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        """One answer for each sample. After a stop request no further batch begins.

        Raises:
            Interrupted: the grace period ended within a batch.
            RunFailed: the accelerator failed.
        """
        for group in self._fit.groups(samples):
            if self._stop.requested:
                return
            self.counts.trial_seconds += self._fit.spent_seconds()
            for generation in self._generated(group):
                yield self._ending.answer(generation)
            self._recover()

    @property
    def dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    def trace(self, samples: Sequence[EncodedSample]) -> list[Trace | None]:
        """Answer samples in batches as a run would, keep every step's logits, count nothing; None for what fails."""
        found: dict[int, Trace] = {}
        counts, on_token = self.counts, self.on_token
        self.counts, self.on_token = EngineCounts(), None
        try:
            for group in self._fit.groups(iter(samples)):
                generations = self._fresh(group)
                for generation in generations:
                    generation.logits_SV = []
                if problem := self._attempt(generations):
                    log.info("parity: %d rows left out, as generation failed (%s: %s)", len(group), *problem)
                    continue
                found |= {
                    id(row.sample): Trace(tuple(row.tokens), row.logits_SV or [])
                    for row in generations
                    if row.fault is None
                }
        finally:
            self.counts, self.on_token = counts, on_token
            self.counts.trial_seconds += self._fit.spent_seconds()
        return [found.get(id(sample)) for sample in samples]

    def _generated(self, group: Sequence[EncodedSample]) -> list[Generation]:
        """A group's generations. What fails is halved until the culprit stands alone; its neighbours are answered."""
        problem = self._attempt(generations := self._fresh(group))
        if problem is None:
            return generations
        if len(group) > 1:
            if not self.counts.num_failed_batches:
                log.warning(
                    "a batch of %d rows failed (%s: %s); it is halved until the rows at fault stand alone",
                    len(group),
                    *problem,
                )
            self.counts.num_failed_batches += 1
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
            raise_fatal(problem)
            found, out_of_memory = described(problem), is_out_of_memory(problem)
        if out_of_memory:
            self._shrink(generations)
        return found

    def _fresh(self, group: Sequence[EncodedSample]) -> list[Generation]:
        return [Generation(sample, sample.max_new_tokens or self.max_new_tokens) for sample in group]

    def _generate(self, generations: list[Generation]) -> None:
        if self._settings.num_beams == 1:
            return self._generate_batch(generations)
        for cap in sorted({generation.max_new_tokens for generation in generations}):  # a search plans to its end
            self._generate_batch([generation for generation in generations if generation.max_new_tokens == cap])

    @torch.inference_mode()
    def _generate_batch(self, generations: list[Generation]) -> None:
        batch = self._model_inputs(self._batcher.collate([generation.sample for generation in generations]))
        settings = copy.copy(self._transformers_settings)
        settings.max_new_tokens = max(generation.max_new_tokens for generation in generations)
        self.counts.num_batches += 1
        self.counts.num_prompt_tokens += int(batch["attention_mask"].sum())
        self.counts.num_padded_prompt_tokens += batch["input_ids"].numel()
        needs_history = self._choose.needs_history
        if self._settings.num_beams > 1:
            penalty = self._settings.sampling.repetition_penalty
            search = BeamSearch(generations, self._ending, self._stop, repetition_penalty=penalty)
            search.run(self._model, batch, settings)
        elif self._fit.own_loop:
            OwnLoop(generations, self._choose, needs_history=needs_history).run(self._model, batch, settings)
        else:
            loop = DecodeLoop(generations, self._choose, self.counts, needs_history=needs_history)
            began, decode_seconds = time.perf_counter(), self.counts.decode_seconds
            self._model.generate(**batch, generation_config=settings, custom_generate=loop)
            in_decode = self.counts.decode_seconds - decode_seconds
            self.counts.prefill_seconds += time.perf_counter() - began - in_decode
        self.counts.num_generated_tokens += sum(len(generation.tokens) for generation in generations)

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
        release_memory(self._loaded.device)

    def _recover(self) -> None:
        """After some batches without trouble the budget doubles, up to what was asked for."""
        if (self._batcher.max_rows, self._batcher.max_tokens) == self._full_budget:
            return
        self._num_calm_batches += 1
        if self._num_calm_batches >= _BATCHES_UNTIL_RECOVERY:
            self._num_calm_batches = 0
            self._batcher.max_rows = min(2 * self._batcher.max_rows, self._full_budget[0])
            self._batcher.max_tokens = min(2 * self._batcher.max_tokens, self._full_budget[1])

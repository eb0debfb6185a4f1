"""The slots engine: continuous batching, and padded batches (static.py) for what does not fit it.

A model is tried before it is trusted (trial.py); rows whose tensors have other names, say rows without an image, are
tried for themselves. What the trial refuses is answered by the static engine, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from pipeline.errors import Interrupted, RunFailed
from pipeline.records import Answer, EncodedSample, Fault, Stage
from pipeline.vlm.answer import Ending, Generation
from pipeline.vlm.base import Batcher, EngineCounts, OnToken, Settle, StopSignal, Trace, not_kept
from pipeline.vlm.choice import TokenChoice
from pipeline.vlm.failure import described, is_out_of_memory, raise_fatal, release_memory
from pipeline.vlm.generation import GenerationSettings
from pipeline.vlm.grammar import Grammar
from pipeline.vlm.inputs import ModelInputs, transformers_settings
from pipeline.vlm.load import LoadedModel
from pipeline.vlm.options import SlotsConfig
from pipeline.vlm.sampling import Sampler
from pipeline.vlm.slots.fit import SlotsFit
from pipeline.vlm.slots.loop import SlotLoop
from pipeline.vlm.slots.prefill import num_prefill_tokens
from pipeline.vlm.slots.queue import Queue, SharedPrefix, Waiting, has_image_positions, has_windows, image_token_ids
from pipeline.vlm.static import StaticEngine

log = logging.getLogger(__name__)

_WINDOW_SLOTS = 8  # samples that are sorted together, for each slot
_REFILL_SHARE = 8  # an eighth of the slots is refilled at once
_CALM_ANSWERS = 256  # after so many without trouble a budget that shrank doubles


class SlotsEngine:
    """See the module's docstring. One engine serves one run.

    static: answers what the slots do not.
    settle: keeps the choice of kernels.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batcher: Batcher,
        sampler: Sampler,
        ending: Ending,
        static: StaticEngine,
        *,
        options: SlotsConfig,
        settings: GenerationSettings,
        max_new_tokens: int,
        stop: StopSignal,
        grammar: Grammar | None = None,
        settle: Settle = not_kept,
    ) -> None:
        self._loaded, self._batcher = loaded, batcher
        self._ending, self._static, self._stop = ending, static, stop
        self._options, self.max_new_tokens = options, max_new_tokens
        self._choose = TokenChoice(sampler, ending, stop, grammar)
        self.fit = SlotsFit(
            loaded,
            batcher,
            ModelInputs(loaded, settings),
            transformers_settings(loaded, settings, ending),
            options=options,
            max_new_tokens=max_new_tokens,
            settle=settle,
        )
        self._shared_prefix: SharedPrefix | None = None
        if options.reuse_prefixes and not has_windows(loaded.model.config):
            config = loaded.model.config
            self._shared_prefix = SharedPrefix(
                image_token_ids(config), ends_after_images=not has_image_positions(config)
            )
        self._max_slots = options.max_batch_rows
        self._full_prefill_tokens = self._max_prefill_tokens = num_prefill_tokens(loaded.model, loaded.device)
        self._num_calm_answers = 0
        self._counts = EngineCounts()
        self.counts = self._counts

    @property
    def counts(self) -> EngineCounts:
        return self._counts

    @counts.setter
    def counts(self, counts: EngineCounts) -> None:
        self._counts = self._static.counts = self.fit.counts = counts

    @property
    def on_token(self) -> OnToken | None:
        return self._choose.on_token

    @on_token.setter
    def on_token(self, listener: OnToken | None) -> None:
        self._choose.on_token = self._static.on_token = listener

    @property
    def numerics(self) -> Mapping[str, str]:
        if self.fit.serves_nothing:
            return self._static.numerics
        return {"engine": "slots", **self.fit.numerics, **self._choose.numerics, **self._loaded.numerics}

    @property
    def dtype(self) -> str:
        return self._static.dtype

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        """One answer for each sample. After a stop request no further row begins.

        Raises:
            Interrupted: the grace period ended while rows were being answered.
            RunFailed: the accelerator failed.
        """
        queue = self._queue(samples)
        loop = self.fit.loop(self._choose)
        while True:
            if not self._stop.requested:
                yield from self._refill(queue, loop)
            yield from self._leaving(loop)
            if loop.num_live:
                yield from self._step(queue, loop)
                yield from self._leaving(loop)
            elif self._stop.requested or queue.ended:
                return

    def trace(self, samples: Sequence[EncodedSample]) -> list[Trace | None]:
        """Answer samples as a run would, keep every step's logits, count nothing; None for what fails."""
        if not all(self.fit.serves([Waiting(sample) for sample in group]) for group in self._batcher.split(samples)):
            return self._static.trace(samples)
        counts, on_token = self.counts, self.on_token
        self.counts, self.on_token = EngineCounts(), None
        found: dict[int, Trace] = {}
        try:
            queue = self._queue(iter(samples))
            loop = self.fit.loop(self._choose)
            while True:
                for _ in self._refill(queue, loop, keep_logits=True):
                    pass  # a row that fails has no trace
                if loop.num_live:
                    loop.step()
                for row in loop.finished():
                    if row.fault is None:
                        found[id(row.sample)] = Trace(tuple(row.tokens), row.logits_SV or [])
                if not loop.num_live and queue.ended:
                    break
        finally:
            counts.trial_seconds += self.counts.trial_seconds
            self.counts, self.on_token = counts, on_token
        return [found.get(id(sample)) for sample in samples]

    def _queue(self, samples: Iterator[EncodedSample]) -> Queue:
        return Queue(
            samples,
            self._batcher,
            num_window_rows=_WINDOW_SLOTS * self._options.max_batch_rows,
            shared=self._shared_prefix,
        )

    def _refill(self, queue: Queue, loop: SlotLoop, *, keep_logits: bool = False) -> Iterator[Answer]:
        """Put rows into the free slots; yields the answers of those that cannot go there."""
        yield from self._seat(queue, loop)
        enough = max(1, self._max_slots // _REFILL_SHARE)
        while loop.num_live < self._max_slots and not loop.num_begun and not loop.has_ended:
            # Few rows at a time are slow to read and to decode: where input is late, what little there is waits.
            if not queue.gather(enough, wait=loop.num_live < enough):
                return
            group = queue.take(self._max_slots, self._max_prefill_tokens)
            if not group:
                return
            if not self.fit.serves(group):
                yield from self._static.answers(one.sample for one in group)
                continue
            if group[0].num_shared and not self.fit.shares(group):
                queue.put_back(Waiting(one.sample) for one in group)  # as wholes they are fewer at a time
                continue
            yield from self._begin(group, queue, loop, keep_logits=keep_logits)
            yield from self._seat(queue, loop)

    def _begin(
        self, group: list[Waiting], queue: Queue, loop: SlotLoop, *, keep_logits: bool = False
    ) -> Iterator[Answer]:
        """Compute prompts; what fails is halved until the culprit stands alone, and its answer is the fault."""
        generations = [self._generation(one.sample, keep_logits=keep_logits) for one in group]
        try:
            loop.begin(group, generations)
            return
        except (Interrupted, RunFailed):
            raise
        except Exception as problem:  # any row may bring a model down in its own way: isolated, recorded, counted
            found, out_of_memory = self._judged(problem)
        if out_of_memory:
            self._count_out_of_memory()
        if len(group) > 1:
            if out_of_memory:
                width = max(one.sample.num_tokens for one in group)
                # Rows of one image count for less than their length in the budget: it shrinks all the same.
                self._max_prefill_tokens = max(1, min(self._max_prefill_tokens, width * len(group)) // 2)
                log.warning("out of memory; prompts of %d tokens are read at a time", self._max_prefill_tokens)
                queue.put_back(group)
                return
            self.counts.num_failed_batches += 1
            half = len(group) // 2
            for part in (group[:half], group[half:]):
                yield from self._begin(part, queue, loop, keep_logits=keep_logits)
            return
        if out_of_memory and loop.num_live:
            self._evict_half(queue, loop)
            queue.put_back(group)
            return
        yield self._ending.answer(replace(generations[0], fault=Fault(Stage.GENERATE, *found)))

    def _seat(self, queue: Queue, loop: SlotLoop) -> Iterator[Answer]:
        """Begun rows into free slots. Out of memory takes rows out of theirs; what fails alone is a fault."""
        while True:
            try:
                loop.seat(self._max_slots)
                return
            except (Interrupted, RunFailed):
                raise
            except Exception as problem:
                found, out_of_memory = self._judged(problem)
            if out_of_memory:
                self._count_out_of_memory()
                if loop.num_live:
                    self._evict_half(queue, loop)
                    return
            yield self._ending.answer(replace(loop.refuse(), fault=Fault(Stage.GENERATE, *found)))

    def _step(self, queue: Queue, loop: SlotLoop) -> Iterator[Answer]:
        """One token more for all. Out of memory takes half of the rows out; another failure is the static engine's."""
        try:
            loop.step()
            return
        except (Interrupted, RunFailed):
            raise
        except Exception as problem:
            found, out_of_memory = self._judged(problem)
        if out_of_memory and loop.num_live > 1:
            self._count_out_of_memory()
            self._evict_half(queue, loop)
            return
        samples = loop.evict(loop.num_live)
        log.warning("a decode step failed (%s: %s); its %d rows go through padded batches", *found, len(samples))
        self.counts.num_failed_batches += 1
        yield from self._static.answers(iter(samples))

    def _count_out_of_memory(self) -> None:
        self.counts.num_out_of_memory += 1
        self._num_calm_answers = 0
        release_memory(self._loaded.device)

    def _evict_half(self, queue: Queue, loop: SlotLoop) -> None:
        num_live = loop.num_live
        self._max_slots = max(1, num_live // 2)
        queue.put_back(Waiting(sample) for sample in loop.evict(num_live - self._max_slots))
        log.warning("out of memory with %d rows; %d rows at a time from here on", num_live, self._max_slots)

    def _judged(self, problem: Exception) -> tuple[tuple[str, str], bool]:
        """What went wrong, and whether it was memory.

        Raises:
            RunFailed: the device answers nothing more.
        """
        raise_fatal(problem)
        return described(problem), is_out_of_memory(problem)

    def _leaving(self, loop: SlotLoop) -> Iterator[Answer]:
        for generation in loop.finished():
            yield self._ending.answer(generation)
            self._recover()

    def _recover(self) -> None:
        """After some answers without trouble the budgets double, up to what was asked for."""
        if (self._max_slots, self._max_prefill_tokens) == (self._options.max_batch_rows, self._full_prefill_tokens):
            return
        self._num_calm_answers += 1
        if self._num_calm_answers >= _CALM_ANSWERS:
            self._num_calm_answers = 0
            self._max_slots = min(2 * self._max_slots, self._options.max_batch_rows)
            self._max_prefill_tokens = min(2 * self._max_prefill_tokens, self._full_prefill_tokens)

    def _generation(self, sample: EncodedSample, *, keep_logits: bool = False) -> Generation:
        logits_SV: list[torch.Tensor] | None = [] if keep_logits else None
        return Generation(sample, sample.max_new_tokens or self.max_new_tokens, logits_SV=logits_SV)

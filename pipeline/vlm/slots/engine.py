"""The slots engine: continuous batching, and padded batches (static.py) for what does not fit it.

A model is tried before it is trusted (trial.py); rows whose tensors have other names, say rows without an image, are
tried for themselves. What the trial refuses is answered by the static engine, and the log says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pipeline.errors import Interrupted, RunFailed
from pipeline.records import Answer, EncodedSample, Fault, Stage
from pipeline.vlm.answer import Ending, Generation
from pipeline.vlm.base import Batcher, EngineCounts, OnToken, StopSignal, Trace
from pipeline.vlm.choice import TokenChoice
from pipeline.vlm.failure import described, free_bytes, is_fatal, is_out_of_memory, release_memory
from pipeline.vlm.generation import GenerationSettings
from pipeline.vlm.inputs import ModelInputs, transformers_settings
from pipeline.vlm.load import LoadedModel
from pipeline.vlm.options import DecodeAttention, SlotsConfig
from pipeline.vlm.sampling import Sampler
from pipeline.vlm.slots.attention import KERNELS, fastest
from pipeline.vlm.slots.features import ImageFeatures
from pipeline.vlm.slots.loop import SlotLoop
from pipeline.vlm.slots.memory import Slot, SlotMemory
from pipeline.vlm.slots.prefill import Prefill
from pipeline.vlm.slots.projection import Projections
from pipeline.vlm.slots.queue import Queue, SharedPrefix, Waiting, has_windows, image_token_ids
from pipeline.vlm.slots.trial import Trial
from pipeline.vlm.static import StaticEngine

log = logging.getLogger(__name__)

_WINDOW_SLOTS = 8  # samples that are sorted together, for each slot
_REFILL_SHARE = 8  # an eighth of the slots is refilled at once
# Of prompts at a time. A CPU is busy with 500, and large results cost it memory that is not at hand.
_PREFILL_TOKENS = {"cpu": 1024, "gpu": 16_384}
_CALM_ANSWERS = 256  # after so many without trouble a budget that shrank doubles
_FEATURE_BYTES = 1 << 30
_CELLS_OF_A_TRIAL = 1 << 16
# Of free memory, for keys and values: prompts need the rest, and on a CPU other programs.
_FREE_SHARE, _FREE_SHARE_CPU = 0.8, 0.4
_WORTH_PACKING = 20_000_000  # parameters; below that calls cost more than their products


class SlotsEngine:
    """See the module's docstring. One engine serves one run. `static` answers what the slots do not."""

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
    ) -> None:
        self._loaded, self._model, self._batcher = loaded, loaded.model, batcher
        self._ending, self._static, self._stop = ending, static, stop
        self._options, self.max_new_tokens = options, max_new_tokens
        self._choose = TokenChoice(sampler, ending, stop)
        self._inputs = ModelInputs(loaded, settings)
        self._transformers_settings = transformers_settings(loaded, settings, ending)
        self._features: ImageFeatures | None = None
        if options.reuse_images:
            self._features = ImageFeatures(loaded.model, batcher, self._inputs, max_bytes=_FEATURE_BYTES)
        self.fits: dict[frozenset[str], bool] = {}  # by the names of a sample's tensors
        self._shares: bool | None = None  # not known yet
        self._shared_prefix: SharedPrefix | None = None
        if options.reuse_prefixes and not has_windows(loaded.model.config):
            self._shared_prefix = SharedPrefix(image_token_ids(loaded.model.config))
        self._projections: Projections | None = None
        self._kernel = "sdpa" if options.decode_attention is DecodeAttention.auto else options.decode_attention.value
        self._max_cells = options.max_slot_tokens or _CELLS_OF_A_TRIAL
        self._max_slots = options.max_batch_rows
        self._max_prefill_tokens = self._full_prefill_tokens = _PREFILL_TOKENS[
            "cpu" if loaded.device.type == "cpu" else "gpu"
        ]
        self._num_calm_answers = 0
        self._counts = EngineCounts()
        self.counts = self._counts

    @property
    def counts(self) -> EngineCounts:
        return self._counts

    @counts.setter
    def counts(self, counts: EngineCounts) -> None:
        self._counts = self._static.counts = counts
        if self._features is not None:
            self._features.counts = counts

    @property
    def on_token(self) -> OnToken | None:
        return self._choose.on_token

    @on_token.setter
    def on_token(self, listener: OnToken | None) -> None:
        self._choose.on_token = self._static.on_token = listener

    @property
    def numerics(self) -> Mapping[str, str]:
        if not any(self.fits.values()) and self.fits:
            return self._static.numerics
        products = str(self._projections.choice) if self._projections else "plain"
        return {"engine": "slots", "decode_attention": self._kernel, "products": products} | self._loaded.numerics

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
        loop, memory = self._new_loop()
        while True:
            memory.max_cells, memory.kernel = self._max_cells, KERNELS[self._kernel]  # known after the first trial
            if not self._stop.requested:
                yield from self._refill(queue, loop, memory)
            yield from self._leaving(loop)
            if loop.num_live:
                yield from self._step(queue, loop, memory)
                yield from self._leaving(loop)
            elif self._stop.requested or queue.ended:
                return

    def trace(self, samples: Sequence[EncodedSample]) -> list[Trace | None]:
        """Answer samples as a run would, keep every step's logits, count nothing; None for what fails."""
        if not all(self._fit([Waiting(sample) for sample in group]) for group in self._batcher.split(samples)):
            return self._static.trace(samples)
        counts, on_token = self.counts, self.on_token
        self.counts, self.on_token = EngineCounts(), None
        found: dict[int, Trace] = {}
        try:
            queue = self._queue(iter(samples))
            loop, memory = self._new_loop()
            while True:
                for _ in self._refill(queue, loop, memory, keep_logits=True):
                    pass  # a row that fails has no trace
                if not loop.num_live and queue.ended:
                    break
                if loop.num_live:
                    loop.step()
                for row in loop.finished():
                    if row.fault is None:
                        found[id(row.sample)] = Trace(tuple(row.tokens), row.logits_SV or [])
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

    def _new_loop(self, choose: Any = None, features: ImageFeatures | None = None) -> tuple[SlotLoop, SlotMemory]:
        choose = self._choose if choose is None else choose
        features = self._features if features is None else features
        memory = SlotMemory(
            max_slots=self._options.max_batch_rows,
            max_cells=self._max_cells,
            kernel=KERNELS[self._kernel],
        )
        prefill = Prefill(
            self._model,
            self._batcher,
            self._inputs,
            self._transformers_settings,
            features,
            needs_history=choose.needs_history,
        )
        return SlotLoop(prefill, memory, choose, self.counts), memory

    def _refill(
        self, queue: Queue, loop: SlotLoop, memory: SlotMemory, *, keep_logits: bool = False
    ) -> Iterator[Answer]:
        """Put rows into the free slots; yields the answers of those that cannot go there."""
        num_free = self._max_slots - loop.num_live
        enough = max(1, self._max_slots // _REFILL_SHARE)
        if num_free < enough:
            return
        # Few rows at a time are slow to read and to decode: where input is late, what little there is waits for more.
        if not queue.gather(enough, wait=loop.num_live < enough):
            return
        while num_free > 0:
            group = queue.take(num_free, self._max_prefill_tokens)
            if not group:
                return
            if not self._fit(group):
                yield from self._static.answers(one.sample for one in group)
                continue
            if group[0].num_shared and not self._fit_shared(group):
                group = [Waiting(one.sample) for one in group]
            generations = [self._generation(one.sample, keep_logits=keep_logits) for one in group]
            slots: list[Slot] = []
            for generation in generations:
                slot = memory.reserve(generation.sample.num_tokens + generation.max_new_tokens)
                if slot is None:
                    break
                slots.append(slot)
            queue.put_back(group[len(slots) :])
            if not slots:
                return
            yield from self._admit(group[: len(slots)], generations[: len(slots)], slots, queue, loop, memory)
            num_free = self._max_slots - loop.num_live

    def _admit(
        self,
        group: list[Waiting],
        generations: list[Generation],
        slots: list[Slot],
        queue: Queue,
        loop: SlotLoop,
        memory: SlotMemory,
    ) -> Iterator[Answer]:
        """Prefill; what fails is halved until the culprit stands alone, and its answer is the fault."""
        try:
            loop.admit(group, generations, slots)
            return
        except (Interrupted, RunFailed):
            raise
        except Exception as problem:  # any row may bring a model down in its own way: isolated, recorded, counted
            found, out_of_memory = self._judged(problem)
        for slot in slots:
            memory.release(slot)
        if out_of_memory:
            self.counts.num_out_of_memory += 1
            self._num_calm_answers = 0
            release_memory(self._loaded.device)
        if len(group) > 1:
            if out_of_memory:
                width = max(one.sample.num_tokens for one in group)
                self._max_prefill_tokens = max(1, width * len(group) // 2)
                log.warning("out of memory; prompts of %d tokens are read at a time", self._max_prefill_tokens)
                queue.put_back(group)
                return
            self.counts.num_failed_batches += 1
            half = len(group) // 2
            for part in (group[:half], group[half:]):
                fresh = [self._generation(one.sample, keep_logits=generations[0].logits_SV is not None) for one in part]
                again = [memory.reserve(one.sample.num_tokens + one.max_new_tokens) for one in fresh]
                yield from self._admit(part, fresh, [slot for slot in again if slot is not None], queue, loop, memory)
            return
        if out_of_memory and loop.num_live:
            self._evict_half(queue, loop)
            queue.put_back(group)
            return
        yield self._ending.answer(replace(generations[0], fault=Fault(Stage.GENERATE, *found)))

    def _step(self, queue: Queue, loop: SlotLoop, memory: SlotMemory) -> Iterator[Answer]:
        """One token more for all. Out of memory takes half of the rows out; another failure is the static engine's."""
        try:
            loop.step()
            return
        except (Interrupted, RunFailed):
            raise
        except Exception as problem:
            found, out_of_memory = self._judged(problem)
        if out_of_memory and loop.num_live > 1:
            self.counts.num_out_of_memory += 1
            release_memory(self._loaded.device)
            self._evict_half(queue, loop)
            return
        samples = loop.evict(loop.num_live)
        log.warning("a decode step failed (%s: %s); its %d rows go through padded batches", *found, len(samples))
        self.counts.num_failed_batches += 1
        yield from self._static.answers(iter(samples))

    def _evict_half(self, queue: Queue, loop: SlotLoop) -> None:
        num_live = loop.num_live
        self._max_slots = max(1, num_live // 2)
        self._num_calm_answers = 0
        queue.put_back(Waiting(sample) for sample in loop.evict(num_live - self._max_slots))
        log.warning("out of memory with %d rows; %d rows at a time from here on", num_live, self._max_slots)

    def _judged(self, problem: Exception) -> tuple[tuple[str, str], bool]:
        """What went wrong, and whether it was memory.

        Raises:
            RunFailed: the device answers nothing more.
        """
        if is_fatal(problem):
            raise RunFailed(f"the accelerator failed and cannot go on: {problem}") from problem
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

    # The trial ---------------------------------------------------------------------------------------------------

    def _fit(self, group: Sequence[Waiting]) -> bool:
        """Whether the slots serve rows like these; tried once for each set of tensors."""
        names = frozenset(group[0].sample.shapes)
        if names not in self.fits:
            with self._timed_trial():
                self.fits[names] = self._try(group)
        return self.fits[names]

    def _fit_shared(self, group: Sequence[Waiting]) -> bool:
        """Whether the model's prompts may go on from a prefix; tried once."""
        if self._shares is None:
            with self._timed_trial():
                self._shares = self._try_shared(group)
        return self._shares

    @contextmanager
    def _timed_trial(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.counts.trial_seconds += time.perf_counter() - began

    def _try_shared(self, group: Sequence[Waiting]) -> bool:
        try:
            trial = Trial(self._model, self._batcher, self._inputs, self._transformers_settings, group[:2])
            error = self._error(trial)
        except Exception as problem:  # whatever a model finds to say about our way of calling it
            self._judged(problem)
            log.info("slots: each prompt is computed from its beginning (%s: %s)", *described(problem))
            return False
        log.info("slots: prompts that begin alike: logits agree to %.0e of the largest", error)
        if error > trial.bound:
            log.info("slots: each prompt is computed from its beginning")
        return error <= trial.bound

    def _try(self, group: Sequence[Waiting]) -> bool:
        group = [Waiting(one.sample) for one in group]
        try:
            trial = Trial(self._model, self._batcher, self._inputs, self._transformers_settings, group)
        except Exception as problem:  # a row may bring any model down: the static engine isolates it
            self._judged(problem)
            log.warning("slots: generate() itself failed on the rows to try (%s: %s)", *described(problem))
            return False
        self._speed_up()
        while True:
            try:
                error = self._error(trial)
                difference = f"logits differ by {error:.1e} of the largest"
            except Exception as problem:  # whatever a model finds to say about our way of calling it
                self._judged(problem)
                error, difference = float("inf"), ": ".join(described(problem))
            if error <= trial.bound:
                log.info(
                    "slots: logits agree with generate() to %.0e of the largest (allowed: %.0e)", error, trial.bound
                )
                return True
            if self._features is not None:
                self._features = None
                log.info("slots: images are encoded with their prompts, as otherwise %s", difference)
            elif self._projections is not None:
                self._projections.restore()
                self._projections = None
                log.info("slots: projections are left as they are, as otherwise %s", difference)
            else:
                log.warning("this model does not fit the slots engine (%s); padded batches answer its rows", difference)
                return False

    def _speed_up(self) -> None:
        """Once, after the model as it is has told the truth: its products faster, and the faster attention."""
        options = self._options
        if self._projections is None and not self.fits and (options.fused_projections or options.packed_weights):
            self._projections = Projections(
                self._model,
                fuse=options.fused_projections,
                pack=options.packed_weights and self._model.num_parameters() >= _WORTH_PACKING,
                free_bytes=free_bytes(self._loaded.device) // 2,
            )

    def _error(self, trial: Trial) -> float:
        counts = self.counts
        self.counts = EngineCounts()
        try:
            memories: list[SlotMemory] = []

            def build(choose: Any) -> SlotLoop:
                loop, memory = self._new_loop(choose)
                memories.append(memory)
                return loop

            def reserve(sample: EncodedSample) -> Slot:
                slot = memories[0].reserve(sample.num_tokens + 64)
                assert slot is not None
                return slot

            error = trial.error(build, reserve)
            if not self.fits:
                self._size(memories[0], max(one.sample.num_tokens for one in trial.waiting))
            return error
        finally:
            self.counts = counts

    def _size(self, memory: SlotMemory, num_prompt_tokens: int) -> None:
        """How much the slots may hold, from what is free; and what attends to them, where that is left to us."""
        if self._options.max_slot_tokens is None:
            share = _FREE_SHARE_CPU if self._loaded.device.type == "cpu" else _FREE_SHARE
            self._max_cells = int(share * free_bytes(self._loaded.device)) // max(1, memory.bytes_per_token)
        if self._options.decode_attention is DecodeAttention.auto:
            text = self._model.config.get_text_config(decoder=True)
            num_cells = num_prompt_tokens + self.max_new_tokens // 2
            self._kernel = fastest(memory, num_heads=text.num_attention_heads, num_cells=num_cells)
            log.info("slots: %s attends in decode steps, the faster of two on this machine", self._kernel)

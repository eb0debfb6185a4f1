"""What of a model the slots may use: tried on rows, before any row is answered so.

Rows whose tensors have other names, say rows without an image, are tried for themselves. What a trial refuses is given
up: what makes the model faster (speedups.py), and then the slots.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from pipeline.errors import RunFailed
from pipeline.vlm.base import Batcher, EngineCounts, Settle
from pipeline.vlm.failure import described, free_bytes, raise_fatal
from pipeline.vlm.inputs import ModelInputs
from pipeline.vlm.load import LoadedModel
from pipeline.vlm.options import SlotsConfig
from pipeline.vlm.slots.features import ImageFeatures
from pipeline.vlm.slots.graph import RecordedDecoder
from pipeline.vlm.slots.loop import Choose, SlotLoop
from pipeline.vlm.slots.memory import SlotMemory
from pipeline.vlm.slots.prefill import Prefill
from pipeline.vlm.slots.queue import Waiting
from pipeline.vlm.slots.speedups import Speedups
from pipeline.vlm.slots.trial import Trial

log = logging.getLogger(__name__)

_FEATURE_BYTES = 1 << 30
_FIRST_CELLS = 1 << 16  # until a trial has shown how large one is
# Of free memory, for keys and values: prompts need the rest, and on a CPU other programs.
_FREE_SHARE, _FREE_SHARE_CPU = 0.8, 0.4
_PATIENCE = 4  # decode steps of a shape before it is recorded: most shapes that come once come often


class SlotsFit:
    """Held by an engine, whose `counts` it keeps."""

    def __init__(
        self,
        loaded: LoadedModel,
        batcher: Batcher,
        inputs: ModelInputs,
        settings: Any,
        *,
        options: SlotsConfig,
        max_new_tokens: int,
        settle: Settle,
    ) -> None:
        self._model, self._device = loaded.model, loaded.device
        self._batcher, self._inputs, self._settings = batcher, inputs, settings
        self._options, self._max_new_tokens = options, max_new_tokens
        self.verdicts: dict[frozenset[str], bool] = {}  # by the names of a sample's tensors
        self._shares: bool | None = None  # not known yet
        features = None
        if options.reuse_images:
            features = ImageFeatures(loaded.model, batcher, inputs, max_bytes=_FEATURE_BYTES)
        self._speedups = Speedups(loaded.model, self._device, features, options, settle)
        # A CPU that waits for nothing gains nothing by reading late, and would compute each row once too often.
        self.reads_late = self._device.type == "cuda"
        self._shares_cells = False  # whether rows look at one copy of their prefix
        self._max_cells = options.max_slot_tokens or _FIRST_CELLS
        self._like_HTD: torch.Tensor | None = None  # keys of the model
        self._prefill: Prefill | None = None
        self._memory: SlotMemory | None = None
        self.counts = EngineCounts()

    @property
    def counts(self) -> EngineCounts:
        return self._counts

    @counts.setter
    def counts(self, counts: EngineCounts) -> None:
        self._counts = counts
        if self._speedups.features is not None:
            self._speedups.features.counts = counts

    @property
    def serves_nothing(self) -> bool:
        """Whether all trials have failed."""
        return bool(self.verdicts) and not any(self.verdicts.values())

    @property
    def numerics(self) -> Mapping[str, str]:
        """What may differ in the last bits between two runs."""
        return self._speedups.numerics

    @property
    def max_cells(self) -> int:
        """Tokens that all slots hold together; known once rows were tried."""
        return self._max_cells

    def loop(self, choose: Choose) -> SlotLoop:
        """Empty slots for the engine. What trials find out while it is at work holds for it, too; one at a time."""
        self._memory = SlotMemory(
            max_slots=self._options.max_batch_rows,
            max_cells=self._max_cells,
            kernel=self._speedups.kernel,
            shares_prefixes=self._shares_cells,
        )
        loop, self._prefill = self._loop_over(self._memory, choose, patience=_PATIENCE, late=self.reads_late)
        return loop

    def _loop_over(
        self, memory: SlotMemory, choose: Choose, *, patience: int, late: bool = False
    ) -> tuple[SlotLoop, Prefill]:
        recorded = None
        if self._speedups.record is not None:  # a trial may yet forbid it
            recorded = partial(
                RecordedDecoder,
                memory=memory,
                record=lambda: self._speedups.record,
                give_up=self._stop_recording,
                patience=patience,
            )
        prefill = Prefill(
            self._model,
            self._batcher,
            self._inputs,
            self._settings,
            self._speedups.features,
            needs_history=choose.needs_history,
            way=self._speedups.way,
        )
        return SlotLoop(prefill, memory, choose, self.counts, recorded, late=late), prefill

    def _stop_recording(self) -> None:
        self._speedups.record = None

    def serves(self, group: Sequence[Waiting]) -> bool:
        """Whether the slots serve rows like these; tried once for each set of tensors."""
        names = frozenset(group[0].sample.shapes)
        if names not in self.verdicts:
            with self._timed():
                self.verdicts[names] = self._try(group)
        return self.verdicts[names]

    def shares(self, group: Sequence[Waiting]) -> bool:
        """Whether the model's prompts may go on from a prefix; tried once."""
        if self._shares is None:
            with self._timed():
                self._shares = self._try_shared(group)
        return self._shares

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """A trial: it takes its time, and what it finds out is for the engine's slots."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.counts.trial_seconds += time.perf_counter() - began
            if self._prefill is not None and self._memory is not None:
                self._prefill.features, self._prefill.way = self._speedups.features, self._speedups.way
                self._memory.max_cells, self._memory.kernel = self._max_cells, self._speedups.kernel
                self._memory.shares_prefixes = self._shares_cells

    def _try_shared(self, group: Sequence[Waiting]) -> bool:
        try:
            trial = Trial(self._model, self._batcher, self._inputs, self._settings, group[:2])
        except Exception as problem:  # a row may bring any model down: the engine isolates it
            raise_fatal(problem)
            log.info("slots: each prompt is computed from its beginning (%s: %s)", *described(problem))
            return False
        self._shares_cells = self._speedups.kernel.shares_prefixes
        while True:
            error, difference = self._measured(trial)
            if error <= trial.bound:
                log.info("slots: prompts that begin alike: logits agree to %.0e of the largest", error)
                return True
            if not self._shares_cells:
                log.info("slots: each prompt is computed from its beginning, as otherwise %s", difference)
                return False
            self._shares_cells = False
            log.info("slots: each row has keys and values of its own, as otherwise %s", difference)

    def _try(self, group: Sequence[Waiting]) -> bool:
        group = [Waiting(one.sample) for one in group]
        try:
            trial = Trial(self._model, self._batcher, self._inputs, self._settings, group)
        except Exception as problem:  # a row may bring any model down: the static engine isolates it
            raise_fatal(problem)
            log.warning("slots: generate() itself failed on the rows to try (%s: %s)", *described(problem))
            return False
        if not self.verdicts:  # once, after the model as it is has told the truth
            self._speedups.find(max(one.sample.num_tokens for one in trial.waiting))
        while True:
            error, difference = self._measured(trial)
            if error <= trial.bound:
                log.info(
                    "slots: logits agree with generate() to %.0e of the largest (allowed: %.0e)", error, trial.bound
                )
                if not self.verdicts:
                    self._take_fastest_attention(trial)
                return True
            if not self._speedups.give_up(difference):
                log.warning("this model does not fit the slots engine (%s); padded batches answer its rows", difference)
                return False

    def _measured(self, trial: Trial) -> tuple[float, str]:
        """The largest difference of logits, of the largest logit, and how to say it."""
        try:
            error = self._error(trial)
            return error, f"logits differ by {error:.1e} of the largest"
        except Exception as problem:  # whatever a model finds to say about our way of calling it
            raise_fatal(problem)
            return float("inf"), ": ".join(described(problem))

    def _error(self, trial: Trial) -> float:
        counts = self.counts
        self.counts = EngineCounts()
        try:
            # Its own few rows, whatever the run's limits: what one row needs is not known before.
            memory = SlotMemory(
                max_slots=len(trial.waiting) + 1,
                max_cells=sys.maxsize,
                kernel=self._speedups.kernel,
                shares_prefixes=self._shares_cells,
            )

            def build(choose: Choose) -> SlotLoop:
                return self._loop_over(memory, choose, patience=0)[0]

            error = trial.error(build)
            if not self.verdicts:
                self._size(memory)
            return error
        finally:
            self.counts = counts

    def _size(self, memory: SlotMemory) -> None:
        """How much the slots may hold, from what is free."""
        if self._options.max_slot_tokens is None:
            share = _FREE_SHARE_CPU if self._device.type == "cpu" else _FREE_SHARE
            self._max_cells = int(share * free_bytes(self._device)) // max(1, memory.bytes_per_token)
        self._like_HTD = memory.pools[0].one_key_H1D.clone()

    def _take_fastest_attention(self, trial: Trial) -> None:
        """Of the kernels for decode steps; one that the trial has not seen is tried, too."""
        speedups, num_cells = self._speedups, max(one.sample.num_tokens for one in trial.waiting)
        assert self._like_HTD is not None
        tried = speedups.kernel
        try:
            speedups.kernel = speedups.fastest_kernel(self._like_HTD, num_cells + self._max_new_tokens // 2)
            error = self._error(trial) if speedups.kernel is not tried else 0.0
            difference = f"logits differ by {error:.1e} of the largest"
        except RunFailed:
            raise
        except Exception as problem:  # whatever a kernel finds to say about a model
            raise_fatal(problem)
            error, difference = float("inf"), ": ".join(described(problem))
        if error > trial.bound:
            log.info("slots: %s attends in decode steps; no other could be used: %s", tried.name, difference)
            speedups.kernel = tried
            return
        log.info("slots: %s attends in decode steps", speedups.kernel.name)

"""The static engine: padded batches of like length, from which finished rows leave.

transformers prepares inputs and cache (`generate`), and calls our loop in place of its own (decode.py).
Encoder-decoders, beam searches and models that our loop does not fit (fit.py) keep transformers' loop (search.py).

Shapes: B rows in the batch, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
import difflib
import gc
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig as TransformersConfig

from pipeline.errors import Interrupted, RunFailed
from pipeline.records import Answer, EncodedSample, Fault, Stage
from pipeline.vlm.answer import Ending, Generation
from pipeline.vlm.base import Batcher, EngineCounts, OnToken, StopSignal, Trace
from pipeline.vlm.decode import DecodeLoop
from pipeline.vlm.fit import Fit
from pipeline.vlm.generation import PROCESSORS, SEARCH, WARPERS, GenerationSettings
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
    ) -> None:
        self._loaded, self._model = loaded, loaded.model
        self._settings = settings
        self._batcher, self._sampler, self._ending = batcher, sampler, ending
        self.max_new_tokens, self._stop = max_new_tokens, stop
        self._full_budget = (batcher.max_rows, batcher.max_tokens)
        self._num_calm_batches = 0
        self._transformers_settings = _transformers_settings(loaded, settings, ending)
        _check_forward(loaded.model, settings)
        self._fit = Fit(
            loaded.model,
            batcher,
            self._transformers_settings,
            self._model_inputs,
            is_encoder_decoder=loaded.is_encoder_decoder,
        )
        self.counts = EngineCounts()
        self.on_token: OnToken | None = None

    @property
    def numerics(self) -> Mapping[str, str]:
        return {"engine": "static"} | self._loaded.numerics

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        """One answer for each sample. After a stop request no further batch begins.

        Raises:
            Interrupted: the grace period ended within a batch.
            RunFailed: the accelerator failed.
        """
        for group in self._fit.groups(samples):
            if self._stop.requested:
                return
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
            if _is_fatal(problem):
                raise RunFailed(f"the accelerator failed and cannot go on: {problem}") from problem
            found = (type(problem).__name__, str(problem).strip().split("\n")[0] or "no message")
            out_of_memory = _is_out_of_memory(problem)
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
        needs_history = self._sampler.needs_history
        if self._settings.num_beams > 1:
            penalty = self._settings.sampling.repetition_penalty
            search = BeamSearch(generations, self._ending, self._stop, repetition_penalty=penalty)
            search.run(self._model, batch, settings)
        elif self._fit.own_loop:
            OwnLoop(generations, self._choose, needs_history=needs_history).run(self._model, batch, settings)
        else:
            loop = DecodeLoop(generations, self._choose, self.counts, needs_history=needs_history)
            self._model.generate(**batch, generation_config=settings, custom_generate=loop)
        self.counts.num_generated_tokens += sum(len(generation.tokens) for generation in generations)

    def _model_inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """A batch on the model's device in its arithmetic, and what else generate() gets.

        Raises:
            RunFailed: generation.extra names what the processor makes of each row.
        """
        if both := sorted(self._settings.forward.keys() & batch.keys()):
            raise RunFailed(f"generation.extra.{both[0]} cannot be set: the processor makes it for each row.")
        return {name: self._moved(tensor) for name, tensor in batch.items()} | dict(self._settings.forward)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self._loaded.device, non_blocking=True)
        return tensor.to(self._model.dtype) if tensor.is_floating_point() else tensor

    def _choose(
        self, generations: Sequence[Generation], logits_BV: torch.Tensor, seen_BV: torch.Tensor | None
    ) -> torch.Tensor:
        """Give each generation its next token, and note it in `seen_BV`."""
        samples, steps = [row.sample for row in generations], [len(row.tokens) for row in generations]
        token_B, finite_B = self._sampler.choose(logits_BV, samples, steps, seen_BV)
        if seen_BV is not None:
            seen_BV.scatter_(1, token_B[:, None], True)
        for place, (row, token, finite) in enumerate(
            zip(generations, token_B.tolist(), finite_B.tolist(), strict=True)
        ):
            if not row.done:  # a finished row may stay in the batch for some steps
                if row.logits_SV is not None:
                    row.logits_SV.append(logits_BV[place].to("cpu", torch.float32, copy=True))
                self._ending.add(row, token, finite=finite)
                if self.on_token is not None and finite:
                    self.on_token(row.sample, token)
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


def _transformers_settings(loaded: LoadedModel, settings: GenerationSettings, ending: Ending) -> Any:
    """Our settings as transformers takes them.

    It would fill in from the model's own what is None here, so the model, and what generates inside of it, is left with
    the names of tokens alone. Choosing a token is the sampler's, ending a row is ours; a cache of fixed size would be
    computed over wholly.
    """
    own = loaded.model.generation_config
    names = {
        "bos_token_id": own.bos_token_id,
        "pad_token_id": loaded.pad_id,
        "decoder_start_token_id": own.decoder_start_token_id,
    }
    for module in loaded.model.modules():
        if hasattr(module, "generation_config"):
            module.generation_config = TransformersConfig(**names)
    try:
        return TransformersConfig(
            **names,
            eos_token_id=sorted(ending.eos_ids) or None,
            use_cache=True,  # saved as False by many a training
            **settings.processors,
        )
    except (TypeError, ValueError) as problem:
        raise RunFailed(f"generation.extra={dict(settings.processors)}: {problem}") from problem


def _check_forward(model: Any, settings: GenerationSettings) -> None:
    known = {*inspect.signature(model.forward).parameters, *inspect.signature(model.generate).parameters}
    for name in settings.forward:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *PROCESSORS, *WARPERS, *SEARCH], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RunFailed(
                f"generation.extra.{name}: neither generate() nor the forward of {type(model).__name__} takes it.{hint}"
            )


def _is_out_of_memory(problem: Exception) -> bool:
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(sign in str(problem) for sign in signs)


def _is_fatal(problem: Exception) -> bool:
    """After these the device answers nothing more: the next rows are not at fault."""
    return not _is_out_of_memory(problem) and ("CUDA error" in str(problem) or "device-side assert" in str(problem))

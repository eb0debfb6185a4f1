"""The vllm engine: the same samples through vLLM's own scheduler, kernels and sampling, for the models it knows.

vLLM decides what is computed together; here requests are fed ahead of it, a bounded number at a time, and answers are
handed on as they finish. Images come prepared from our worker processes (vllm_inputs.py). An answer ends by the rules
of every engine: vLLM is told them, and its tokens are put through `Ending`.

What it does not share with the other engines: sampling. Its random numbers are its own, seeded by row, so an answer is
the same in any batch, but not that of static or slots. It shows no logits, and logits that are not finite go unseen.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Interrupted, RunFailed
from pipeline.records import Answer, EncodedSample, Fault, FinishReason, Stage
from pipeline.vlm.answer import Ending, Generation
from pipeline.vlm.base import EngineCounts, OnToken, StopSignal, Trace
from pipeline.vlm.constraint import Constraint
from pipeline.vlm.generation import GenerationSettings
from pipeline.vlm.grammar import rule_of
from pipeline.vlm.sampling import row_seed
from pipeline.vlm.vllm_inputs import ProcessedInputs

log = logging.getLogger(__name__)

_AHEAD = 2  # requests at vLLM for each that it computes: the next one is there when a place is free
_PATIENCE_SECONDS = 0.5  # between two looks at whether it still runs
_MAX_STARTS = 3  # one after the other, without an answer in between
_SMALLEST_TOP_P = 1e-6  # vLLM refuses 0, which is the likeliest token alone


@dataclass(frozen=True, slots=True)
class Running:
    """vLLM with a model, in a process of its own as a rule."""

    llm: Any  # vllm.v1.engine.llm_engine.LLMEngine
    inputs: ProcessedInputs


class Ended(Exception):
    """The process in which vLLM computes is gone."""


class VllmEngine:
    """See the module's docstring. One engine serves one run."""

    def __init__(
        self,
        running: Running,
        start: Callable[[], Running],
        ending: Ending,
        *,
        settings: GenerationSettings,
        stop_strings: Sequence[str],
        seed: int,
        max_new_tokens: int,
        max_batch_rows: int,
        stop: StopSignal,
        numerics: Mapping[str, str],
        constraint: Constraint | None = None,
    ) -> None:
        self._constraint = constraint
        self._running, self._start, self._ending = running, start, ending
        self._settings, self._stop_strings, self._seed = settings, list(stop_strings), seed
        self.max_new_tokens, self._stop = max_new_tokens, stop
        self._max_in_flight = _AHEAD * max_batch_rows
        self._numerics = dict(numerics)
        self._num_requests = 0
        self._num_starts = 0  # since the last answer
        self.counts = EngineCounts()
        self.on_token: OnToken | None = None

    @property
    def numerics(self) -> Mapping[str, str]:
        return self._numerics

    @property
    def dtype(self) -> str:
        return self._numerics["dtype"]

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        """One answer for each sample. After a stop request nothing more is fed, and what is in flight is finished.

        Raises:
            Interrupted: the grace period ended while rows were being answered.
            RunFailed: vLLM ended.
        """
        for generation in self._generations(samples):
            yield self._ending.answer(generation)

    def trace(self, samples: Sequence[EncodedSample]) -> list[Trace | None]:
        """Answer samples together, count nothing; tokens alone, as vLLM shows no logits. None for what fails."""
        counts, on_token = self.counts, self.on_token
        self.counts, self.on_token = EngineCounts(), None
        try:
            done = list(self._generations(iter(samples)))
        finally:
            self.counts, self.on_token = counts, on_token
        found = {id(one.sample): Trace(tuple(one.tokens), []) for one in done if one.fault is None}
        return [found.get(id(sample)) for sample in samples]

    def _generations(self, samples: Iterator[EncodedSample]) -> Iterator[Generation]:
        """Finished generations; in flight are at most _AHEAD times as many as vLLM computes together.

        Where vLLM's process ends, what was in flight is asked again, row by row: a row with which it ends again is at
        fault, and its neighbours are answered.
        """
        flying: dict[str, Generation] = {}
        suspects: deque[EncodedSample] = deque()
        more = True
        try:
            while more or flying or suspects:
                more = more and not self._stop.requested
                if self._stop.requested:
                    suspects.clear()  # left to the next start
                try:
                    # What has to be waited for is waited for only while vLLM has nothing to do.
                    while not self._is_full(flying, suspects) and (suspects or more):
                        if not suspects and flying and not getattr(samples, "ready", True):
                            break
                        sample = suspects.popleft() if suspects else next(samples, None)
                        if sample is None:
                            more = False
                            break
                        generation = Generation(sample, sample.max_new_tokens or self.max_new_tokens)
                        self._num_requests += 1
                        name = str(self._num_requests)
                        flying[name] = generation
                        self._submit(name, generation)
                        if generation.done:
                            yield flying.pop(name)
                    if flying:
                        yield from self._step(flying)
                except Ended as problem:
                    yield from self._restarted(flying, suspects, problem)
                if flying and self._stop.expired:
                    raise Interrupted("the grace period ended while rows were being answered")
        finally:
            if flying:
                with contextlib.suppress(Exception):  # of no use any more, in an engine that may have ended
                    self._running.llm.abort_request(list(flying))

    def _is_full(self, flying: Mapping[str, Generation], suspects: Sequence[EncodedSample]) -> bool:
        return len(flying) >= (1 if suspects else self._max_in_flight)

    def _restarted(
        self, flying: dict[str, Generation], suspects: deque[EncodedSample], problem: Ended
    ) -> Iterator[Generation]:
        """Start vLLM again. The one row in flight is at fault; of several any may be.

        Raises:
            Interrupted: the signal that asks the run to end has reached vLLM as well (Ctrl-C, Slurm).
            RunFailed: it ends again and again.
        """
        lost = [generation.sample for generation in flying.values()]
        flying.clear()
        if self._stop.requested:
            raise Interrupted("the signal stopped vLLM as well; rows in flight are left to the next start") from problem
        self._num_starts += 1
        if self._num_starts > _MAX_STARTS:
            raise RunFailed(
                f"the process in which vLLM computes ended {self._num_starts} times in a row; its reason stands above. "
                "Where it was memory, set a smaller engine.gpu_memory_utilization, engine.max_batch_rows or "
                "engine.max_model_len. Finished rows are on disk."
            ) from problem
        self.counts.num_failed_batches += 1
        log.warning("vLLM ended with %d rows in flight; it is started again, and they are asked row by row", len(lost))
        if len(lost) == 1:
            message = "the process in which vLLM computes ends with this row; its reason is in the log"
            fault = Fault(Stage.GENERATE, "EngineDeadError", message)
            yield Generation(lost[0], self.max_new_tokens, fault=fault)
        else:
            suspects.extend(lost)
        with contextlib.suppress(Exception):  # of what is left of it
            self._running.llm.engine_core.shutdown()
        self._running = self._start()

    def _submit(self, name: str, generation: Generation) -> None:
        """Make a request of a sample. What vLLM does not take is the row's fault.

        Raises:
            Ended: see there.
        """
        try:
            prompt = self._running.inputs.of(generation.sample)
            self._running.llm.add_request(name, prompt, self._parameters(generation))
        except Exception as problem:  # vLLM has an exception for each thing that it does not take
            if _is_end(problem):
                raise Ended from problem
            generation.fault = Fault(Stage.GENERATE, type(problem).__name__, one_line(problem))
            return
        self.counts.num_prompt_tokens += generation.sample.num_tokens
        self.counts.num_padded_prompt_tokens += generation.sample.num_tokens  # nothing is padded

    def _parameters(self, generation: Generation) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = self._settings.sampling
        drawn: dict[str, Any] = {"temperature": 0.0}
        if sampling.do_sample:
            drawn = {
                "temperature": max(0.0, sampling.temperature),
                "top_p": max(_SMALLEST_TOP_P, sampling.top_p),
                "top_k": sampling.top_k,
                "seed": row_seed(self._seed, generation.sample) >> 1,  # vLLM's are signed
                **sampling.warpers,
            }
        if self._constraint is not None:
            from vllm.sampling_params import StructuredOutputsParams

            rule = rule_of(self._constraint, generation.sample.choices)
            drawn["structured_outputs"] = StructuredOutputsParams(grammar=rule)
        return SamplingParams(
            **drawn,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=generation.max_new_tokens,
            min_tokens=min(int(self._settings.processors.get("min_new_tokens", 0)), generation.max_new_tokens),
            stop=self._stop_strings,
            include_stop_str_in_output=True,  # `Ending` cuts it off
            detokenize=bool(self._stop_strings),
            stop_token_ids=sorted(self._ending.eos_ids),
            ignore_eos=True,  # the ends are those above
            output_kind=RequestOutputKind.DELTA if self.on_token else RequestOutputKind.FINAL_ONLY,
        )

    def _step(self, flying: dict[str, Generation]) -> list[Generation]:
        """Let vLLM compute, or wait for what it computes; the generations that it finished, taken from `flying`.

        Raises:
            Ended: see there.
            Interrupted: the grace period ended.
            RunFailed: vLLM failed in this process.
        """
        self._wait()
        try:
            outputs = self._running.llm.step()
        except Exception as problem:
            if _is_end(problem):
                raise Ended from problem
            raise RunFailed(
                f"vLLM failed, and cannot go on: {type(problem).__name__}: {one_line(problem)}"
            ) from problem
        self.counts.num_decode_steps += 1
        done = []
        for output in outputs:
            generation = flying.get(output.request_id)
            if generation is None:
                continue
            (completion,) = output.outputs
            for token in completion.token_ids:
                if not generation.done:
                    self._ending.add(generation, token, finite=True)
                    if self.on_token is not None:
                        self.on_token(generation.sample, token)
            if generation.done or output.finished:
                if not output.finished:
                    self._running.llm.abort_request([output.request_id])
                _end(generation, completion.finish_reason)
                self.counts.num_generated_tokens += len(generation.tokens)
                self.counts.num_decode_rows += len(generation.tokens)
                self._num_starts = 0
                done.append(flying.pop(output.request_id))
        return done

    def _wait(self) -> None:
        """Until there is something to hand on: `step` would wait forever for a process that was killed (vLLM 0.32)."""
        core = self._running.llm.engine_core
        outputs = getattr(core, "outputs_queue", None)  # none where vLLM computes in this process
        while outputs is not None and outputs.empty():
            if core.resources.engine_dead:
                raise Ended
            if self._stop.expired:
                raise Interrupted("the grace period ended while rows were being answered")
            with outputs.not_empty:
                if not outputs.queue:
                    outputs.not_empty.wait(_PATIENCE_SECONDS)


def _is_end(problem: Exception) -> bool:
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(problem, EngineDeadError)


def _end(generation: Generation, finish_reason: str | None) -> None:
    """The end of a request that our own rules did not end: vLLM's context is full, or it gave the request up."""
    if generation.done:
        return
    if finish_reason == "length":
        generation.finish_reason = FinishReason.LENGTH
    elif finish_reason == "stop":
        generation.finish_reason = FinishReason.STOP
    else:
        message = f"vLLM ended the request ({finish_reason}) after {len(generation.tokens)} tokens"
        generation.fault = Fault(Stage.GENERATE, "RequestEnded", message)


def one_line(problem: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(problem).split())[:400] or "no message"

"""The vllm engine: the same samples through vLLM's own scheduler, kernels and sampling, for the models it knows.

vLLM decides what is computed together; here requests are fed ahead of it, a bounded number at a time, and answers are
handed on as they finish. Images come prepared from our worker processes (vllm_inputs.py). An answer ends by the rules
of every engine: vLLM is told them, and its tokens are put through `Ending`.

What it does not share with the other engines: sampling. Its random numbers are its own, seeded by row, so an answer is
the same in any batch, but not that of static or slots. It shows no logits, and logits that are not finite go unseen.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pipeline.errors import Interrupted, RunFailed, UsageError
from pipeline.records import Answer, EncodedSample, Fault, FinishReason, Stage
from pipeline.vlm.answer import Ending, Generation
from pipeline.vlm.base import EngineCounts, OnToken, StopSignal, Trace
from pipeline.vlm.generation import GenerationSettings, effective_settings, log_settings
from pipeline.vlm.identity import ModelIdentity
from pipeline.vlm.options import Attention, GenerationConfig, Quantization, VllmConfig, VlmConfig
from pipeline.vlm.sampling import row_seed
from pipeline.vlm.vllm_inputs import ProcessedInputs

log = logging.getLogger(__name__)

_AHEAD = 2  # requests at vLLM for each that it computes: the next one is there when a place is free
_HONOURED = ("min_new_tokens",)  # of generation's processors
_HONOURED_WARPERS = ("min_p",)
_SMALLEST_TOP_P = 1e-6  # vLLM refuses 0, which is the likeliest token alone
_GIB = 1 << 30
# What vLLM reads from the environment, where the user has not set it. A forked process inherits our threads' locks.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


def check_vllm(engine: VllmConfig, vlm: VlmConfig, settings: GenerationSettings) -> None:
    """What engine=vllm cannot honour, found out without vLLM and before a model is loaded.

    Raises:
        UsageError: an option that has no counterpart in vLLM, or vLLM is not installed.
    """
    if settings.num_beams > 1:
        raise UsageError(
            "engine=vllm does not search over beams: leave generation.extra.num_beams out, or set it to 1."
        )
    refused = [name for name in settings.processors if name not in _HONOURED]
    refused += [name for name in settings.sampling.warpers if name not in _HONOURED_WARPERS]
    if refused := sorted([*refused, *settings.forward]):
        raise UsageError(
            f"engine=vllm cannot honour {', '.join(refused)} (of generation.extra, or of the checkpoint's "
            f"generation_config.json); it knows {', '.join([*_HONOURED, *_HONOURED_WARPERS])}. Set "
            f"generation.extra.{refused[0]}=null to go without, or take engine=static."
        )
    if vlm.quantization is not Quantization.none:
        raise UsageError(
            f"engine=vllm does not quantize a model while it loads (vlm.quantization={vlm.quantization.value}). Give "
            "it a checkpoint that is quantized already, or take engine=static."
        )
    if vlm.attn_implementation is not Attention.auto:
        raise UsageError(
            f"vlm.attn_implementation={vlm.attn_implementation.value}: engine=vllm has attention kernels of its own. "
            "Leave it at auto."
        )
    if vlm.device_map is not None:
        raise UsageError("vlm.device_map spreads a transformers model; with engine=vllm set tensor_parallel_size.")
    if ":" in vlm.device:
        raise UsageError(
            f"vlm.device={vlm.device}: engine=vllm takes the first devices it sees. Choose them with "
            "CUDA_VISIBLE_DEVICES, and leave vlm.device at auto."
        )
    if importlib.util.find_spec("vllm") is None:
        raise UsageError("engine=vllm needs the package vllm: pip install 'vlm-batch[vllm]'.")


def load_vllm_engine(
    vlm: VlmConfig,
    engine: VllmConfig,
    generation: GenerationConfig,
    identity: ModelIdentity,
    *,
    seed: int,
    stop: StopSignal,
) -> VllmEngine:
    """Load the model into vLLM.

    Raises:
        UsageError: as `check_vllm`; or vLLM computes on another device than vlm.device.
        RunFailed: vLLM does not know the model, cannot load it, or prepares its images in a way of its own.
    """
    settings = effective_settings(generation, identity.generation_config)
    log_settings(settings, identity.generation_config)
    check_vllm(engine, vlm, settings)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine
    except Exception as problem:  # a library of its dozens may be missing or of another version
        raise RunFailed(f"the package vllm is installed, but cannot be imported: {_line(problem)}") from problem
    if vlm.device not in ("auto", current_platform.device_type):
        raise UsageError(
            f"vlm.device={vlm.device}: the installed vLLM computes on {current_platform.device_type}. Use auto."
        )
    arguments = engine_arguments(vlm, engine, identity, seed=seed, on_cpu=current_platform.is_cpu())
    try:
        llm = LLMEngine.from_engine_args(EngineArgs(**arguments))
        transformers_processor, tokenizer, eos_ids = _of_folder(vlm, identity)
        inputs = ProcessedInputs(llm.renderer.get_mm_processor())
        inputs.check(transformers_processor)
    except RunFailed:
        raise
    except Exception as problem:  # vLLM fails in many ways on a model that it does not know or that does not fit
        raise RunFailed(f"vLLM cannot load the model in {identity.folder}: {_line(problem)}") from problem
    return VllmEngine(
        llm,
        inputs,
        Ending(tokenizer, eos_ids=eos_ids, stop=generation.stop, ignore_eos=generation.ignore_eos),
        settings=settings,
        stop_strings=generation.stop,
        seed=seed,
        max_new_tokens=generation.max_new_tokens,
        max_batch_rows=engine.max_batch_rows,
        stop=stop,
        numerics={
            "engine": "vllm",
            "vllm": vllm.__version__,
            "device": str(current_platform.get_device_name()),
            "dtype": identity.dtype,
            "torch": torch.__version__,
        },
    )


def engine_arguments(
    vlm: VlmConfig, engine: VllmConfig, identity: ModelIdentity, *, seed: int, on_cpu: bool
) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs.

    vLLM's cache of prepared images stays off: it serves images that vLLM prepares. Encoded images are shared by content
    all the same. On a CPU the share of memory that vLLM takes would be that of the whole machine, workers or not.
    """
    memory = engine.kv_cache_memory_bytes
    chosen = engine.gpu_memory_utilization is not None or "VLLM_CPU_KVCACHE_SPACE" in os.environ
    if memory is None and on_cpu and not chosen:
        memory = min(4 * _GIB, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
    given = {
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "kv_cache_memory_bytes": memory,
        "max_model_len": engine.max_model_len,
        "mm_processor_kwargs": dict(vlm.processor) or None,
    }
    return {name: value for name, value in given.items() if value is not None} | {
        "model": str(identity.folder),
        "dtype": identity.dtype,
        "trust_remote_code": vlm.trust_remote_code,
        "load_format": "auto" if vlm.allow_pickle else "safetensors",
        "tensor_parallel_size": engine.tensor_parallel_size,
        "enforce_eager": engine.enforce_eager,
        "max_num_seqs": engine.max_batch_rows,
        "mm_processor_cache_gb": 0,
        "limit_mm_per_prompt": {"video": 0, "audio": 0},  # no memory is kept for them
        "generation_config": "vllm",  # settings come with each request, those of the checkpoint included
        "disable_log_stats": True,
        "seed": seed % (1 << 31),
    }


class VllmEngine:
    """See the module's docstring. One engine serves one run."""

    def __init__(
        self,
        llm: Any,  # vllm.v1.engine.llm_engine.LLMEngine
        inputs: ProcessedInputs,
        ending: Ending,
        *,
        settings: GenerationSettings,
        stop_strings: Sequence[str],
        seed: int,
        max_new_tokens: int,
        max_batch_rows: int,
        stop: StopSignal,
        numerics: Mapping[str, str],
    ) -> None:
        self._llm, self._inputs, self._ending = llm, inputs, ending
        self._settings, self._stop_strings, self._seed = settings, list(stop_strings), seed
        self.max_new_tokens, self._stop = max_new_tokens, stop
        self._max_in_flight = _AHEAD * max_batch_rows
        self._numerics = dict(numerics)
        self._num_requests = 0
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
        """Finished generations; in flight are at most _AHEAD times as many as vLLM computes together."""
        flying: dict[str, Generation] = {}
        more = True
        try:
            while more or flying:
                more = more and not self._stop.requested
                # What has to be waited for is waited for only while vLLM has nothing to do.
                while more and len(flying) < self._max_in_flight and (not flying or getattr(samples, "ready", True)):
                    sample = next(samples, None)
                    if sample is None:
                        more = False
                        break
                    generation = Generation(sample, sample.max_new_tokens or self.max_new_tokens)
                    if name := self._submitted(generation):
                        flying[name] = generation
                    else:
                        yield generation
                    more = not self._stop.requested
                if flying:
                    yield from self._step(flying)
                if flying and self._stop.expired:
                    raise Interrupted("the grace period ended while rows were being answered")
        finally:
            if flying:
                with contextlib.suppress(Exception):  # of no use any more, in an engine that may have ended
                    self._llm.abort_request(list(flying))

    def _submitted(self, generation: Generation) -> str | None:
        """The name of the sample's request; None where vLLM refuses it, which is the row's fault."""
        self._num_requests += 1
        name = str(self._num_requests)
        try:
            self._llm.add_request(name, self._inputs.of(generation.sample), self._parameters(generation))
        except Exception as problem:  # vLLM has an exception for each thing that it does not take
            self._check_alive(problem)
            generation.fault = Fault(Stage.GENERATE, type(problem).__name__, _line(problem))
            return None
        self.counts.num_prompt_tokens += generation.sample.num_tokens
        self.counts.num_padded_prompt_tokens += generation.sample.num_tokens  # nothing is padded
        return name

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
        """Let vLLM compute, or wait for what it computes; the generations that it finished, taken from `flying`."""
        try:
            outputs = self._llm.step()
        except Exception as problem:
            self._check_alive(problem)
            raise RunFailed(f"vLLM failed, and cannot go on: {type(problem).__name__}: {_line(problem)}") from problem
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
                    self._llm.abort_request([output.request_id])
                _end(generation, completion.finish_reason)
                self.counts.num_generated_tokens += len(generation.tokens)
                self.counts.num_decode_rows += len(generation.tokens)
                done.append(flying.pop(output.request_id))
        return done

    def _check_alive(self, problem: Exception) -> None:
        """Raise where the process that computes has ended: the row at hand is not at fault.

        Raises:
            Interrupted: a signal that was meant for the run has reached that process as well (Ctrl-C, Slurm).
            RunFailed: it ended for another reason, which it has printed.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        if not isinstance(problem, EngineDeadError):
            return
        if self._stop.requested:
            raise Interrupted(
                "vLLM was stopped by the signal as well; rows in flight are left for the next start"
            ) from (problem)
        raise RunFailed(
            "the process in which vLLM computes has ended; its reason stands above. Where it was memory, set a smaller "
            "engine.gpu_memory_utilization, engine.max_batch_rows or engine.max_model_len. Finished rows are on disk."
        ) from problem


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


def _of_folder(vlm: VlmConfig, identity: ModelIdentity) -> tuple[Any, Any, tuple[int, ...]]:
    """The processor of transformers, its tokenizer, and the tokens that end an answer."""
    from transformers import AutoConfig, AutoProcessor, GenerationConfig

    trust = vlm.trust_remote_code
    processor = AutoProcessor.from_pretrained(identity.folder, trust_remote_code=trust, **vlm.processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    found = identity.generation_config.get("eos_token_id")
    if found is None:
        config = AutoConfig.from_pretrained(identity.folder, trust_remote_code=trust)
        found = GenerationConfig.from_model_config(config).eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    eos_ids = found if isinstance(found, (list, tuple)) else [] if found is None else [found]
    return processor, tokenizer, tuple(map(int, eos_ids))


def _line(problem: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(problem).split())[:400] or "no message"

"""A model in vLLM: what of the configuration it cannot honour, its arguments, and its start.

vLLM is imported here, when a model is loaded, and only in the versions that the extra `vllm` allows.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.answer import Ending
from pipeline.vlm.base import StopSignal
from pipeline.vlm.constraint import constraint_of
from pipeline.vlm.generation import GenerationSettings, effective_settings, log_settings
from pipeline.vlm.grammar import AnswerForm, token_table
from pipeline.vlm.identity import ModelIdentity
from pipeline.vlm.options import Attention, GenerationConfig, Quantization, VllmConfig, VlmConfig
from pipeline.vlm.vllm_engine import Running, VllmEngine, one_line
from pipeline.vlm.vllm_inputs import ProcessedInputs
from pipeline.vlm.vllm_process import RUN_PROCESS

_HONOURED = ("min_new_tokens",)  # of generation's processors
_HONOURED_WARPERS = ("min_p",)
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
    constraint = constraint_of(generation)
    form = None if constraint is None else AnswerForm(constraint)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[RUN_PROCESS] = str(os.getpid())
    try:
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine
    except Exception as problem:  # a library of its dozens may be missing or of another version
        raise RunFailed(f"the package vllm is installed, but cannot be imported: {one_line(problem)}") from problem
    if vlm.device not in ("auto", current_platform.device_type):
        raise UsageError(
            f"vlm.device={vlm.device}: the installed vLLM computes on {current_platform.device_type}. Use auto."
        )
    arguments = engine_arguments(vlm, engine, identity, seed=seed, on_cpu=current_platform.is_cpu())

    def start() -> Running:
        try:
            llm = LLMEngine.from_engine_args(EngineArgs(**arguments))
            return Running(llm, ProcessedInputs(llm.renderer.get_mm_processor()))
        except Exception as problem:  # vLLM fails in many ways on a model that it does not know or that does not fit
            said = f"{type(problem).__name__}: {one_line(problem)}"
            raise RunFailed(f"vLLM cannot load the model in {identity.folder}: {said}") from problem

    processor, tokenizer, eos_ids = _of_folder(vlm, identity)
    if constraint is not None:
        token_table(constraint, tokenizer)
        # vLLM lets the tokenizer's own end token stand where an answer is complete, and no other.
        eos_ids = tuple({*eos_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    running = start()
    running.inputs.check(processor)
    return VllmEngine(
        running,
        start,
        Ending(
            tokenizer,
            eos_ids=eos_ids,
            stop=generation.stop,
            ignore_eos=generation.ignore_eos,
            form=form,
        ),
        settings=settings,
        stop_strings=generation.stop,
        seed=seed,
        max_new_tokens=generation.max_new_tokens,
        max_batch_rows=engine.max_batch_rows,
        stop=stop,
        constraint=constraint,
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
        "mm_device_do_normalize": False,  # images come with real numbers
        "limit_mm_per_prompt": {"video": 0, "audio": 0},  # no memory is kept for them
        "generation_config": "vllm",  # settings come with each request, those of the checkpoint included
        "disable_log_stats": True,
        "structured_outputs_config": {"backend": "guidance"},  # the library of the other engines, with the same rules
        "seed": seed % (1 << 31),
    }


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

"""The model in memory: class, arithmetic, device and attention kernel from its folder and a few options.

Everything that can be known to be wrong is refused before the weights are read (see `check_model`), and what came out
is compared with what was asked for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from pipeline.errors import RunFailed
from pipeline.vlm.architecture import model_class, model_config, skeleton
from pipeline.vlm.attention import check_kernel, chosen_kernel, kernel_text
from pipeline.vlm.device import check_fits, input_device, keep_freed_memory, placement
from pipeline.vlm.identity import ModelIdentity, stored_quantization
from pipeline.vlm.options import VlmConfig
from pipeline.vlm.quantize import (
    QuantizedWeights,
    check_quantization,
    quantization_arguments,
    quantized_names,
    quantized_weights,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to generate, and what it was made of."""

    model: Any  # transformers PreTrainedModel, in eval mode
    tokenizer: Any
    device: torch.device  # where inputs go; with vlm.device_map the model has others as well
    eos_ids: tuple[int, ...]
    pad_id: int
    is_encoder_decoder: bool
    quantized: QuantizedWeights | None = None  # None where vlm.quantization is none

    @property
    def numerics(self) -> dict[str, str]:
        """What may differ in the last bits between two machines: recorded in each shard."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        found = {
            "device": name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": kernel_text(self.model),
            "torch": torch.__version__,
        }
        return found | ({"quantization": self.quantized.kind} if self.quantized else {})


def check_model(options: VlmConfig, identity: ModelIdentity) -> None:
    """What `load_model` would refuse without reading weights: in a second, before any data is read.

    Raises:
        UsageError: an option of vlm cannot work with this model, machine or installation.
        RunFailed: the folder holds no image-text-to-text model, or its configuration is damaged.
    """
    device = placement(options).device
    check_quantization(options)
    bones = skeleton(options, identity, model_config(options, identity))
    chosen_kernel(options.attn_implementation, bones, device=device, dtype=getattr(torch, identity.dtype))
    quantized_names(options, bones)


def load_model(options: VlmConfig, identity: ModelIdentity, *, num_threads: int) -> LoadedModel:
    """Load the weights.

    num_threads: of the CPU, for a model that computes there: all cores, as the worker processes give way to it. A tiny
    model takes one (more slow it many times).

    Raises:
        UsageError: as `check_model`.
        RunFailed: as `check_model`; the weights do not fit the class, or do not fit into memory.
    """
    place = placement(options)
    check_quantization(options)
    config = model_config(options, identity)
    bones = skeleton(options, identity, config)
    dtype = getattr(torch, identity.dtype)
    kernel = chosen_kernel(options.attn_implementation, bones, device=place.device, dtype=dtype)
    kernel.log()
    names = quantized_names(options, bones)
    if not names and not stored_quantization(identity.config):
        check_fits(place, sum(weight.nbytes for weight in bones.parameters()))
    transformers_logging.disable_progress_bar()  # the run has a bar of its own
    if options.trust_remote_code and (auto_map := identity.config.get("auto_map")):
        log.warning("running Python code that came with the model: %s", ", ".join(sorted(map(str, auto_map.values()))))
    model = _with_weights(
        model_class(options, identity, config),
        identity,
        dtype=dtype,
        attn_implementation=kernel.implementation,
        use_safetensors=None if options.allow_pickle else True,
        trust_remote_code=options.trust_remote_code,
        **place.arguments,
        **quantization_arguments(options, bones, dtype),
    )
    device = input_device(model, place)
    if not place.arguments:
        model.to(device)
    check_kernel(kernel, model)
    tokenizer = _tokenizer(options, identity)
    if dtype == torch.float32:
        # cuDNN's convolutions would round their inputs to 10 bits (TF32): float32 answers are exact here.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(1 if model.num_parameters() < 20_000_000 else max(1, num_threads))
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        device=device,
        eos_ids=_eos_ids(model, tokenizer),
        pad_id=_pad_id(model, tokenizer),
        is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
        quantized=quantized_weights(options, model, names, dtype) if names else None,
    )


def _with_weights(model_class: Any, identity: ModelIdentity, **arguments: Any) -> Any:
    """A model all of whose weights come from its files: transformers fills in random ones and only warns.

    Raises:
        RunFailed: weights are lacking, have other shapes, or do not fit into memory.
    """
    folder = identity.folder
    loud = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report says that weights drawn at random are fine; ours follows
    try:
        # Mismatches are "ignored" only to be told which they are, instead of one sentence about a report.
        model, loading = model_class.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except (torch.OutOfMemoryError, MemoryError) as problem:
        raise RunFailed(
            f"the model in {folder} does not fit into the memory of its device: {problem}. Take vlm.dtype=bfloat16, "
            "vlm.quantization=int8, vlm.device_map=auto (several GPUs) or a smaller model."
        ) from problem
    except Exception as problem:  # a model's own code may fail in any way on weights that are not its own
        stored = stored_quantization(identity.config)
        kind = f" (its weights are quantized: {stored})" if stored else ""
        raise RunFailed(f"the model in {folder}{kind} cannot be loaded: {problem}") from problem
    finally:
        transformers_logging.set_verbosity(loud)
    if wrong := sorted(loading["mismatched_keys"]):
        name, stored_shape, shape = wrong[0]
        raise RunFailed(
            f"{len(wrong)} weights in {folder} have other shapes than config.json says: {name}: {tuple(stored_shape)}, "
            f"not {tuple(shape)} ... The files are of different models; download the model again."
        )
    if missing := sorted(loading["missing_keys"]):
        raise RunFailed(
            f"the files in {folder} lack {len(missing)} weights of the model: "
            f"{missing[:3]} ... Download the model again, or save it whole."
        )
    if unused := sorted(loading["unexpected_keys"]):
        log.warning("%d weights in %s have no place in the model: %s ...", len(unused), folder, unused[:3])
    return model


def _tokenizer(options: VlmConfig, identity: ModelIdentity) -> Any:
    try:
        return AutoTokenizer.from_pretrained(identity.folder, trust_remote_code=options.trust_remote_code)
    except Exception as problem:  # each tokenizer class has its own way to fail on a file that is missing or damaged
        raise RunFailed(f"the tokenizer in {identity.folder} cannot be loaded: {problem}") from problem


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    found = model.generation_config.eos_token_id
    found = found if found is not None else tokenizer.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)


def _pad_id(model: Any, tokenizer: Any) -> int:
    for found in (model.generation_config.pad_token_id, tokenizer.pad_token_id, *_eos_ids(model, tokenizer)):
        if found is not None:
            return int(found)
    return 0

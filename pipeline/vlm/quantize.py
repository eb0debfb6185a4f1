"""Quantized weights of the language model, and how many bytes that truly saves.

Quantization is for models that do not fit: on a GPU Quanto writes every weight back to 16 bits before it multiplies, so
a batch takes longer. Vision tower and projector stay as they are unless vlm.quantize_vision asks for them; the output
embeddings always stay. bitsandbytes' int8 is LLM.int8 (Dettmers et al. 2022), whose outlier columns are those of the
whole batch: there a neighbour can change an answer. Quanto quantizes weights alone, so that no batch does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, QuantoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.options import Quantization, QuantizationBackend, VlmConfig

log = logging.getLogger(__name__)

_PACKAGES = {QuantizationBackend.quanto: "optimum-quanto", QuantizationBackend.bitsandbytes: "bitsandbytes"}
_IMPORTS = {QuantizationBackend.quanto: "optimum.quanto", QuantizationBackend.bitsandbytes: "bitsandbytes"}
_NF4_BLOCK = 64  # weights that share a scale; bitsandbytes' kernel for the CPU takes rows of whole blocks alone


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """What quantization made of a model."""

    kind: str  # "int8 (optimum-quanto 0.2.7)"
    num_modules: int  # linear layers that are quantized
    size_bytes: int  # of all weights, as they lie in memory
    full_size_bytes: int  # of the same weights in vlm.dtype


def check_quantization(options: VlmConfig) -> None:
    """Whether what is asked for exists and is installed.

    Raises:
        UsageError: the backend does not know the format, its package is missing, or nothing is quantized at all.
    """
    if options.quantization is Quantization.none:
        if options.quantize_vision:
            raise UsageError("vlm.quantize_vision=true needs vlm.quantization=int8, int4 or float8.")
        return
    backend = options.quantization_backend
    if backend is QuantizationBackend.bitsandbytes and options.quantization is Quantization.float8:
        raise UsageError(
            "vlm.quantization=float8: bitsandbytes has int8 and int4 alone. Use vlm.quantization_backend=quanto."
        )
    try:
        found = importlib.util.find_spec(_IMPORTS[backend])
    except ModuleNotFoundError:  # of the parent package
        found = None
    if found is None:
        raise UsageError(
            f"vlm.quantization={options.quantization.value} needs the package {_PACKAGES[backend]}: "
            f"pip install 'vlm-batch[{backend.value}]'."
        )


def quantized_names(options: VlmConfig, skeleton: Any) -> list[str]:
    """Names of the linear layers that vlm.quantization is about, in a model without weights.

    Raises:
        UsageError: there are none.
    """
    if options.quantization is Quantization.none:
        return []
    candidates = set(map(id, skeleton.modules())) if options.quantize_vision else _language(skeleton.get_decoder())
    if (head := skeleton.get_output_embeddings()) is not None:
        candidates -= {id(module) for module in head.modules()}
    num_tokens = getattr(skeleton.config.get_text_config(), "vocab_size", None)
    names = [
        name
        for name, module in skeleton.named_modules()
        # A subclass may do more than multiply, and would lose that. A head is one whether or not the model says so.
        if type(module) is nn.Linear and id(module) in candidates and module.out_features != num_tokens
        and _has_kernel(options, module)
        and should_convert_module(name, skeleton._keep_in_fp32_modules)  # the class asks for float32 there
    ]  # fmt: skip
    if not names:
        raise UsageError(
            f"vlm.quantization={options.quantization.value}: {type(skeleton).__name__} has no linear layer in its "
            "language model that could be quantized. Use vlm.quantization=none."
        )
    return names


def quantization_arguments(options: VlmConfig, skeleton: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What from_pretrained has to be told to quantize exactly the layers of quantized_names()."""
    names = set(quantized_names(options, skeleton))
    if not names:
        return {}
    # transformers takes regular expressions that match a name from its start up to a dot or its end.
    kept = [
        re.escape(name)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and name not in names
    ]
    if options.quantization_backend is QuantizationBackend.quanto:
        _do_without_compiler()
        return {"quantization_config": QuantoConfig(options.quantization.value, modules_to_not_convert=kept)}
    # It says at every layer of every step that it casts to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if options.quantization is Quantization.int8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
        )
    }


def quantized_weights(options: VlmConfig, model: Any, names: list[str], dtype: torch.dtype) -> QuantizedWeights:
    """Check that exactly these layers of a loaded model are quantized, measure the model and log one line.

    Raises:
        RunFailed: others are, or some are not.
    """
    layers = {name: module for name, module in model.named_modules() if _is_quantized(options, module)}
    if wrong := set(layers) ^ set(names):
        raise RunFailed(
            f"vlm.quantization={options.quantization.value}: expected {len(names)} quantized layers, and found "
            f"{len(layers)}; {sorted(wrong)[:3]} differ. Use vlm.quantization=none for this model."
        )
    if options.quantization_backend is QuantizationBackend.quanto:
        for layer in layers.values():
            _make_inference_tensor(layer)
    package = _PACKAGES[options.quantization_backend]
    size_bytes = _num_bytes(_weights(model))
    stored_bytes = _num_bytes(tensor for layer in layers.values() for tensor in _pieces(layer.weight))
    full_bytes = sum(layer.in_features * layer.out_features for layer in layers.values()) * dtype.itemsize
    made = QuantizedWeights(
        f"{options.quantization.value} ({package} {importlib.metadata.version(package)})",
        len(layers),
        size_bytes,
        size_bytes - stored_bytes + full_bytes,
    )
    log.info(
        "quantization: %s, %d linear layers; the weights take %.1f MB, unquantized they would take %.1f MB",
        made.kind,
        made.num_modules,
        made.size_bytes / 1e6,
        made.full_size_bytes / 1e6,
    )
    return made


def _language(decoder: Any) -> set[int]:
    """Ids of the modules of a decoder that do not see images. Some decoders hold the vision tower too, as GIT's does:
    of these the stacks of layers alone are taken, which leaves out the projector as well."""
    seeing = [
        part
        for part in decoder.modules()
        if part is not decoder and isinstance(part, PreTrainedModel) and part.main_input_name.startswith("pixel")
    ]
    encoder = decoder.get_encoder(modality="image") if isinstance(decoder, PreTrainedModel) else decoder
    seeing += [encoder] if encoder is not decoder else []
    if not seeing:
        return {id(module) for module in decoder.modules()}
    stacks = [part for part in decoder.modules() if isinstance(part, nn.ModuleList)]
    vision = {id(module) for part in seeing for module in part.modules()}
    return {id(module) for stack in stacks for module in stack.modules()} - vision


def _has_kernel(options: VlmConfig, layer: nn.Linear) -> bool:
    is_nf4 = options.quantization is Quantization.int4
    if options.quantization_backend is QuantizationBackend.bitsandbytes and is_nf4:
        return layer.in_features % _NF4_BLOCK == 0
    return True


def _is_quantized(options: VlmConfig, module: nn.Module) -> bool:
    if options.quantization_backend is QuantizationBackend.quanto:
        from optimum.quanto import QModuleMixin

        return isinstance(module, QModuleMixin) and module.frozen
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return isinstance(module, (Linear4bit, Linear8bitLt))


def _do_without_compiler() -> None:
    """Keep Quanto from compiling C++ or CUDA code at first use.

    It would need ninja, a compiler and (on a GPU) nvcc, writes into its own installed folder, and starts one build in
    each worker. What the build gives is unpacking of int4, which is one line of torch, and two GPU kernels (float16
    with int4, float8) that Quanto leaves out by itself where the extension is absent.
    """
    from optimum.quanto.library.extensions import extension

    for name in ("quanto_cpp", "quanto_cuda", "quanto_hip", "quanto_mps"):
        if (found := extension._extensions.get(name)) is not None:
            found._lib = SimpleNamespace(unpack=_unpack)
    extension._extensions.pop("quanto_cuda", None)


def _make_inference_tensor(layer: Any) -> None:
    """Make a layer's weight anew in inference mode: of one made outside of it Quanto's int4 cannot take a view within
    ("Cannot set version_counter for inference tensor"), and there the engines work."""
    weight = layer.weight
    names, meta = weight.__tensor_flatten__()
    with torch.inference_mode():
        pieces = {name: getattr(weight, name) for name in names}
        made = type(weight).__tensor_unflatten__(pieces, meta, weight.size(), weight.stride())
        layer.weight = nn.Parameter(made, requires_grad=False)


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of `bits` bits out of bytes (uint8): the lowest bits of all of them first, along the first axis."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def _weights(model: Any) -> Iterator[torch.Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        yield from _pieces(tensor)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors of which a weight consists: packed numbers, scales, shifts."""
    if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol for tensors made of tensors; Quanto's are
        for name in tensor.__tensor_flatten__()[0]:
            yield from _pieces(getattr(tensor, name))
        return
    yield tensor
    for holder in (getattr(tensor, "quant_state", None), tensor):  # bitsandbytes keeps them beside the weight
        for name in ("absmax", "code", "offset", "SCB"):
            if isinstance(piece := getattr(holder, name, None), torch.Tensor):
                yield piece


def _num_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of memory behind tensors; what several of them share counts once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())

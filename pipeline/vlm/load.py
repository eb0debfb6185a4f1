"""The model in memory: class, arithmetic, device and attention kernel from its folder and a few options."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.identity import ModelIdentity
from pipeline.vlm.options import Attention, Dtype, VlmConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to generate, and what it was made of."""

    model: Any  # transformers PreTrainedModel, in eval mode
    tokenizer: Any
    device: torch.device
    eos_ids: tuple[int, ...]
    pad_id: int
    is_encoder_decoder: bool

    @property
    def numerics(self) -> dict[str, str]:
        """What may differ in the last bits between two machines: recorded in each shard."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {
            "device": name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": str(self.model.config._attn_implementation),
            "torch": torch.__version__,
        }


def load_model(options: VlmConfig, identity: ModelIdentity, *, num_threads: int) -> LoadedModel:
    """Load the weights.

    num_threads: of the CPU, for a model that computes there; a tiny model takes one (more slow it many times).

    Raises:
        UsageError: the device is not there.
        RunFailed: the folder holds no model of transformers' image-text-to-text classes.
    """
    device = _device(options.device)
    transformers_logging.disable_progress_bar()  # the run has a bar of its own
    source = str(identity.folder)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=options.trust_remote_code)
        model = _with_attention(
            options,
            device,
            pretrained_model_name_or_path=source,
            dtype="auto" if options.dtype is Dtype.auto else getattr(torch, options.dtype.value),
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options.trust_remote_code)
        model.eval().to(device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as problem:
        raise RunFailed(f"the model in {source} cannot be loaded: {problem}") from problem
    if device.type == "cpu":
        torch.set_num_threads(1 if model.num_parameters() < 20_000_000 else max(1, num_threads))
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=device,
        eos_ids=_eos_ids(model, tokenizer),
        pad_id=_pad_id(model, tokenizer),
        is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
    )


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as problem:
        raise UsageError(f"vlm.device={wanted}: expected auto, cpu, cuda, cuda:n or mps.") from problem
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"vlm.device={wanted}: this machine has {torch.cuda.device_count()} CUDA devices. Use vlm.device=auto."
        )
    return device


def _with_attention(options: VlmConfig, device: torch.device, **arguments: Any) -> Any:
    wanted = options.attn_implementation
    if wanted is not Attention.auto:
        return _whole(attn_implementation=wanted.value, **arguments)
    candidates = ["sdpa", "eager"]
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") and options.dtype is not Dtype.float32:
        candidates.insert(0, "flash_attention_2")
    for name in candidates:
        try:
            return _whole(attn_implementation=name, **arguments)
        except (ValueError, ImportError) as problem:
            if name == candidates[-1]:
                raise
            log.info("%s does not fit this model (%s); trying the next kernel", name, problem)
    raise AssertionError("unreachable")


def _whole(**arguments: Any) -> Any:
    """A model all of whose weights come from its files: transformers fills in random ones and only warns.

    Raises:
        RunFailed: the files lack some of the weights.
    """
    model, loading = AutoModelForImageTextToText.from_pretrained(output_loading_info=True, **arguments)
    if missing := sorted(loading["missing_keys"]):
        raise RunFailed(
            f"the files in {arguments['pretrained_model_name_or_path']} lack {len(missing)} weights of the model: "
            f"{missing[:3]} ... Download the model again, or save it whole."
        )
    return model


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

"""The class behind a model folder, and its skeleton: every module, no weights.

What can be known to be wrong of a folder without reading weights is refused here: a model of another kind, code of its
own that nobody trusted, a package that is missing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import ContextManagers

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.identity import ModelIdentity
from pipeline.vlm.options import VlmConfig

# Under which names models with code of their own register the class that answers; the first one found is taken.
_REMOTE_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM")


def model_config(options: VlmConfig, identity: ModelIdentity) -> Any:
    """The configuration of the model, checked to be that of an image-text-to-text model.

    Raises:
        UsageError: the model brings code of its own, and vlm.trust_remote_code is false.
        RunFailed: its configuration is damaged, or it is a model of another kind.
    """
    folder, auto_map = identity.folder, identity.config.get("auto_map") or {}
    kind = identity.config.get("model_type")
    trusted = bool(auto_map) and options.trust_remote_code
    if kind not in CONFIG_MAPPING and not trusted:
        if auto_map:
            raise UsageError(
                f"vlm.path={options.path}: the installed transformers has no class for model_type {kind!r}; the model "
                f"brings Python code of its own ({', '.join(sorted(map(str, auto_map.values())))}). Read it, and set "
                "vlm.trust_remote_code=true if you trust it."
            )
        raise RunFailed(
            f"vlm.path={options.path}: the installed transformers knows no model_type {kind!r}. Install a newer "
            "transformers, or check config.json."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as problem:  # a configuration class may fail in any way on a file that it did not write
        raise RunFailed(f"{folder / 'config.json'} is no configuration of a model: {_first_line(problem)}") from problem
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not (trusted and _remote_class(auto_map)):
        raise RunFailed(
            f"vlm.path={options.path}: a model of model_type {kind!r} (architectures: "
            f"{identity.config.get('architectures')}) is no image-text-to-text model of transformers. Expected one "
            "that takes images and answers in text, such as SmolVLM, Qwen2.5-VL or LLaVA."
        )
    _refuse_kernels(options, config)
    return config


def _refuse_kernels(options: VlmConfig, config: Any) -> None:
    """Refuse an attention kernel of a hub repository: making the model would fetch and run it (CVE-2026-4372)."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        name = getattr(part, "_attn_implementation", None)
        if isinstance(name, str) and "/" in name:
            raise UsageError(
                f"vlm.path={options.path}: config.json asks for the attention kernel {name!r}, which is code from "
                "elsewhere. Remove attn_implementation from config.json; vlm.attn_implementation chooses one."
            )


def model_class(options: VlmConfig, identity: ModelIdentity, config: Any) -> Any:
    """The class that answers: the model's own where its code is trusted, else transformers'."""
    reference = _remote_class(identity.config.get("auto_map") or {})
    if options.trust_remote_code and reference:
        return get_class_from_dynamic_module(reference, str(identity.folder))
    found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    if not isinstance(found, (list, tuple)):
        return found
    by_name = {each.__name__: each for each in found}
    return next((by_name[name] for name in config.architectures or () if name in by_name), found[0])


def skeleton(options: VlmConfig, identity: ModelIdentity, config: Any) -> Any:
    """The model on the meta device, made as from_pretrained makes it: 0.1 s for any size.

    Raises:
        RunFailed: the class does not take this configuration, or needs a package that is missing.
    """
    found = model_class(options, identity, config)
    config.dtype = dtype = getattr(torch, identity.dtype)
    try:
        with ContextManagers(found.get_init_context(dtype, False, False, None)):
            return found(config)
    except Exception as problem:  # as above: any class of error says that the configuration does not fit the code
        raise RunFailed(
            f"{identity.folder / 'config.json'} does not make a {found.__name__}: {_first_line(problem)}"
        ) from problem


def _remote_class(auto_map: Any) -> str | None:
    return next((str(auto_map[name]) for name in _REMOTE_CLASSES if name in auto_map), None)


def _first_line(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:300]}"

"""What generate() is given: our settings in transformers' terms, and a batch on the model's device."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig as TransformersConfig

from pipeline.errors import RunFailed
from pipeline.vlm.answer import Ending
from pipeline.vlm.generation import PROCESSORS, SEARCH, WARPERS, GenerationSettings
from pipeline.vlm.load import LoadedModel


class ModelInputs:
    """Makes of what Batcher.collate gives what generate() takes.

    Raises:
        RunFailed: generation.extra names what neither generate() nor the model's forward takes.
    """

    def __init__(self, loaded: LoadedModel, settings: GenerationSettings) -> None:
        self._model, self._device, self._settings = loaded.model, loaded.device, settings
        model = loaded.model
        known = {*inspect.signature(model.forward).parameters, *inspect.signature(model.generate).parameters}
        for name in settings.forward:
            if name not in known:
                near = difflib.get_close_matches(name, [*known, *PROCESSORS, *WARPERS, *SEARCH], n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise RunFailed(
                    f"generation.extra.{name}: neither generate() nor the forward of {type(model).__name__} "
                    f"takes it.{hint}"
                )

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """A batch on the model's device in its arithmetic, and what else generate() gets.

        Raises:
            RunFailed: generation.extra names what the processor makes of each row.
        """
        if both := sorted(self._settings.forward.keys() & batch.keys()):
            raise RunFailed(f"generation.extra.{both[0]} cannot be set: the processor makes it for each row.")
        return {name: self.moved(tensor) for name, tensor in batch.items()} | dict(self._settings.forward)

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the model's device; numbers with a fraction in its arithmetic."""
        dtype = self._model.dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.numel() > 1 and not any(tensor.stride()):  # a stand-in that nobody reads: it stays without memory
            return tensor.new_zeros((), dtype=dtype, device=self._device).expand(tensor.shape)
        if self._device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True).to(dtype)


def transformers_settings(loaded: LoadedModel, settings: GenerationSettings, ending: Ending) -> Any:
    """Our settings as transformers takes them.

    It would fill in from the model's own what is None here, so the model, and what generates inside of it, is left with
    the names of tokens alone. Choosing a token is the sampler's, ending a row is ours; a cache of fixed size would be
    computed over wholly.

    Raises:
        RunFailed: it does not take one of generation.extra.
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

"""Which attention kernel a model runs with, decided before its weights are read.

transformers asks every part of a composite model (vision tower, decoder) whether it supports a kernel; so do we, on a
skeleton without weights. What transformers would do silently where a flash attention package is absent (fetch a kernel
from the hub) cannot happen: a kernel is named to it only after its package was found here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.options import Attention

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _FlashPackage:
    """A version of flash attention: its package, how to get it, and the oldest GPU that it runs on."""

    distribution: str
    is_installed: Callable[[], bool]
    remedy: str
    capability: tuple[int, int]


_FLASH = {
    Attention.flash_attention_2: _FlashPackage(
        "flash-attn", is_flash_attn_2_available, "pip install 'vlm-batch[flash]'", (8, 0)
    ),
    Attention.flash_attention_3: _FlashPackage(
        "flash-attn-3",
        is_flash_attn_3_available,
        "it is built from the folder hopper of github.com/Dao-AILab/flash-attention; "
        "pip install 'vlm-batch[flash]' brings flash_attention_2",
        (8, 0),
    ),
    Attention.flash_attention_4: _FlashPackage(
        "flash-attn-4",
        is_flash_attn_4_available,
        "pip install --pre flash-attn-4; pip install 'vlm-batch[flash]' brings flash_attention_2",
        (9, 0),
    ),
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A choice. `implementation` is what from_pretrained is given; None lets every part take its own, sdpa or eager."""

    implementation: str | None
    reason: str

    def log(self) -> None:
        """Say in one line what was chosen, and why."""
        log.info("attention: %s (%s)", self.implementation or "sdpa and eager", self.reason)


def chosen_kernel(wanted: Attention, skeleton: Any, *, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel for this model, arithmetic and device: what was asked for, or for auto the fastest that fits.

    skeleton: the model on the meta device.

    Raises:
        UsageError: the kernel that was asked for cannot work; says why.
    """
    if wanted is not Attention.auto:
        if problem := _obstacle(wanted, skeleton, device, dtype):
            raise UsageError(
                f"vlm.attn_implementation={wanted.value} cannot work: {problem}. "
                "Use vlm.attn_implementation=auto, which takes the fastest kernel that fits."
            )
        return Kernel(wanted.value, "as asked for")
    no_flash = []
    for flash, package in _FLASH.items():
        if (problem := _obstacle(flash, skeleton, device, dtype)) is None:
            return Kernel(flash.value, f"{package.distribution} is installed, and model, dtype and device fit it")
        no_flash.append(problem)
    if (problem := _obstacle(Attention.sdpa, skeleton, device, dtype)) is None:
        return Kernel(Attention.sdpa.value, no_flash[0])  # of the version that the extra installs
    return Kernel(None, f"{problem}; {no_flash[0]}")


def check_kernel(kernel: Kernel, model: Any) -> None:
    """Compare what the loaded model says of itself with what was chosen.

    Raises:
        RunFailed: they differ.
    """
    allowed = {kernel.implementation} if kernel.implementation else {Attention.sdpa.value, Attention.eager.value}
    if others := {name: found for name, found in kernels_of(model).items() if found not in allowed}:
        raise RunFailed(
            f"attention {kernel.implementation or 'sdpa or eager'} was chosen, but after loading the model has "
            f"{others}. Choose another vlm.attn_implementation."
        )


def kernels_of(model: Any) -> dict[str, str]:
    """Class of each part of a model -> its attention kernel."""
    return {type(part).__name__: str(part.config._attn_implementation) for part in _parts(model)}


def kernel_text(model: Any) -> str:
    """A model's kernels for the record: `sdpa`, or `eager (GotOcr2VisionEncoder), sdpa (Qwen2Model)`."""
    found = kernels_of(model)
    names = sorted(set(found.values()))
    if len(names) < 2:
        return "".join(names) or str(model.config._attn_implementation)
    return ", ".join(
        f"{name} ({' '.join(sorted(part for part, own in found.items() if own == name))})" for name in names
    )


def _obstacle(wanted: Attention, skeleton: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """What speaks against a kernel; None where nothing does."""
    if wanted is Attention.eager:
        return None
    if wanted is Attention.sdpa:
        return _unsupported("_supports_sdpa", "sdpa", skeleton)
    package = _FLASH[wanted]
    if device.type != "cuda":
        return f"flash attention needs a CUDA device; this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention computes in bfloat16 or float16; vlm.dtype is {str(dtype).removeprefix('torch.')}"
    if not package.is_installed():
        return f"the package {package.distribution} is not installed ({package.remedy})"
    if (capability := torch.cuda.get_device_capability(device)) < package.capability:
        needed, found = (".".join(map(str, version)) for version in (package.capability, capability))
        return f"{package.distribution} needs a GPU of compute capability {needed}; this one has {found}"
    if problem := _unsupported("_supports_flash_attn", "flash attention", skeleton):
        return problem
    # Some classes take certain kernels alone; transformers would put one of those in place of ours.
    for part in _parts(skeleton):
        compatible = getattr(part, "_compatible_flash_implementations", None)
        if compatible and wanted.value not in compatible:
            return f"{type(part).__name__} works with {', '.join(compatible)} alone"
    return None


def _unsupported(attribute: str, kernel: str, skeleton: Any) -> str | None:
    names = sorted({type(part).__name__ for part in _parts(skeleton) if not getattr(part, attribute, False)})
    return f"{', '.join(names)} of this model does not support {kernel}" if names else None


def _parts(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))

"""What an exception of the model's means: too little memory, a device that is lost, or a row that is at fault."""

from __future__ import annotations

import gc

import torch

_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(problem: Exception) -> bool:
    """Whether less at a time may do."""
    return isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in str(problem) for sign in _OUT_OF_MEMORY
    )


def is_fatal(problem: Exception) -> bool:
    """After these the device answers nothing more: the next rows are not at fault."""
    return not is_out_of_memory(problem) and ("CUDA error" in str(problem) or "device-side assert" in str(problem))


def described(problem: Exception) -> tuple[str, str]:
    """Class and first line of what went wrong. The exception itself would keep its tensors alive."""
    return type(problem).__name__, str(problem).strip().split("\n")[0] or "no message"


def release_memory(device: torch.device) -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

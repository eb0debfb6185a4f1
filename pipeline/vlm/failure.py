"""What an exception of the model means: too little memory, a lost device, a row at fault; and the memory left."""

from __future__ import annotations

import gc
import os

import torch

from pipeline.errors import RunFailed
from pipeline.ranks import ranks

_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(problem: Exception) -> bool:
    """Whether less at a time may do."""
    return isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in str(problem) for sign in _OUT_OF_MEMORY
    )


def is_fatal(problem: Exception) -> bool:
    """After these the device answers nothing more: the next rows are not at fault."""
    return not is_out_of_memory(problem) and ("CUDA error" in str(problem) or "device-side assert" in str(problem))


def raise_fatal(problem: Exception) -> None:
    """Go on after anything else.

    Raises:
        RunFailed: the device answers nothing more.
    """
    if is_fatal(problem):
        raise RunFailed(f"the accelerator failed and cannot go on: {problem}") from problem


def described(problem: Exception) -> tuple[str, str]:
    """Class and first line of what went wrong. The exception itself would keep its tensors alive."""
    return type(problem).__name__, str(problem).strip().split("\n")[0] or "no message"


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device; of a CPU this process's share of what the system calls available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024 // ranks().local_world
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def release_memory(device: torch.device) -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

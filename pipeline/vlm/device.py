"""Where a model computes: one device, or spread over all GPUs of the machine."""

from __future__ import annotations

import ctypes
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import RunFailed, UsageError
from pipeline.ranks import ranks
from pipeline.vlm.options import DeviceMap, VlmConfig

_GIB = 1 << 30
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h; 32 MiB is the most that it takes


@dataclass(frozen=True, slots=True)
class Placement:
    """`device` is where inputs go; `arguments` tell from_pretrained where weights go."""

    device: torch.device
    arguments: dict[str, Any]


def placement(options: VlmConfig) -> Placement:
    """What vlm.device and vlm.device_map ask for.

    Raises:
        UsageError: the device is not there, or both keys are set.
    """
    if options.device_map is None:
        device = _device(options.device)
        # On a GPU weights go straight there, without a copy of the whole model in the host's memory.
        return Placement(device, {"device_map": {"": device}} if device.type == "cuda" else {})
    if options.device != "auto":
        raise UsageError(
            f"vlm.device_map={options.device_map.value} spreads the model over all devices, and vlm.device="
            f"{options.device} names one. Set one of them."
        )
    arguments: dict[str, Any] = {"device_map": DeviceMap.auto.value}
    if memory := _gpu_memory():
        arguments["max_memory"] = memory  # GPUs alone: see check_placed
    return Placement(_device("auto"), arguments)


def machine_name(device: torch.device) -> str:
    """The kind of GPU or of CPU: two of one name are taken to be as fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = None
    if (lines := Path("/proc/cpuinfo")).exists():
        found = re.search(r"^model name\s*:\s*(.+)$", lines.read_text(), re.MULTILINE)
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{device.type} ({model}, {torch.backends.cpu.get_cpu_capability()})"


def keep_freed_memory() -> None:
    """Have glibc keep the memory of tensors on a CPU that are freed, instead of giving it back to the system.

    A large result is otherwise fetched from the system page by page, again and again: a product of 1,200 rows ran at
    140 GFLOP/s instead of 270 on a virtual machine, where a new page costs microseconds. Other C libraries are left as
    they are.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, num_bytes in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 1 << 30), (_M_TOP_PAD, 64 << 20)):
        set_option(option, num_bytes)


def check_fits(place: Placement, num_bytes: int) -> None:
    """Refuse a model that is larger than all GPUs together before its weights are read.

    Raises:
        RunFailed: its weights alone take more than there is.
    """
    memory = place.arguments.get("max_memory")
    if memory and num_bytes > sum(memory.values()):
        raise RunFailed(
            f"the weights take {num_bytes / _GIB:.1f} GiB, and {len(memory)} GPUs have "
            f"{sum(memory.values()) / _GIB:.1f} GiB free. {_REMEDIES}"
        )


def input_device(model: Any, place: Placement) -> torch.device:
    """Where the inputs of a loaded model go: to its input embeddings.

    Offloading to the host's memory or to disk is refused: each token would move those weights anew, which costs a
    hundred times the time of a model that fits.

    Raises:
        RunFailed: part of a model that was spread over GPUs did not fit there.
    """
    parts = getattr(model, "hf_device_map", None)
    if "max_memory" not in place.arguments and "disk" not in set((parts or {}).values()):
        return place.device
    if left := sorted(name for name, device in (parts or {}).items() if device in ("cpu", "disk")):
        raise RunFailed(
            f"the model does not fit into the memory of its devices: {len(left)} of its parts are left over "
            f"({left[0]} ...). {_REMEDIES}"
        )
    found: torch.device = model.get_input_embeddings().weight.device
    return found


_REMEDIES = (
    "Offloading to disk is far too slow for a batch job and is not done. Take vlm.quantization=int8, a smaller model, "
    "or a machine with more memory."
)


def _gpu_memory() -> dict[int, int]:
    """Free bytes of each GPU, a tenth left for activations and cache."""
    return {
        index: int(0.9 * torch.cuda.mem_get_info(index)[0])
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    }


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        if torch.cuda.is_available():
            own = ranks()
            if own.local_world == 1:
                return torch.device("cuda")
            return torch.device("cuda", own.local_rank % torch.cuda.device_count())  # a GPU for each process
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as problem:
        raise UsageError(f"vlm.device={wanted}: expected auto, cpu, cuda, cuda:n or mps.") from problem
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"vlm.device={wanted}: this machine has {torch.cuda.device_count()} CUDA devices. Use vlm.device=auto."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"vlm.device={wanted}: this machine has no Apple GPU that torch can use. Use vlm.device=auto.")
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "cpu" and device.index):
        raise UsageError(f"vlm.device={wanted}: expected auto, cpu, cuda, cuda:n or mps.")
    return device

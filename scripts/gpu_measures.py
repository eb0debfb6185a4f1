"""What the checks of the GPU suite measure of a loaded model: time, attention kernels, differences, bytes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from gpu_subject import Subject, capped, engine
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from pipeline.records import Answer, EncodedSample
from pipeline.vlm.load import LoadedModel

# What runs attention: kernels of a GPU, and the operators of torch that choose between them.
_KERNEL = re.compile(r"flash|fmha|cudnn.*(sdpa|attention)|mem_?eff", re.IGNORECASE)
_OPERATOR = re.compile(r"_scaled_dot_product_(?!attention$)\w+|flash_attn")
_FLASH_KERNEL = re.compile(r"flash_fwd|flash_att|FlashAtt|flash::|sdpa_sm\d+_flash_fprop", re.IGNORECASE)
_FLASH_ON_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Side:
    """A loaded model with its engine, which has looked at the model already: what comes now is work."""

    def __init__(self, loaded: LoadedModel, samples: Sequence[EncodedSample]) -> None:
        self.loaded = loaded
        self._engine = engine(loaded, max_rows=len(samples))
        self.answers(samples, 2)

    def answers(self, samples: Sequence[EncodedSample], max_new_tokens: int) -> list[Answer]:
        """All samples answered in one batch.

        Raises:
            RuntimeError: a row has no answer of full length.
        """
        num_batches = self._engine.counts.num_batches
        found = list(self._engine.answers(iter(capped(samples, max_new_tokens))))
        wrong = [each for each in found if each.fault or each.num_generated_tokens != max_new_tokens]
        if wrong or len(found) != len(samples):
            raise RuntimeError(f"{len(samples)} rows, {len(found)} answers, of which wrong: {wrong[:3]}")
        if self._engine.counts.num_batches != num_batches + 1:
            raise RuntimeError(f"{len(samples)} rows took {self._engine.counts.num_batches - num_batches} batches")
        return found

    def seconds(self, samples: Sequence[EncodedSample], max_new_tokens: int) -> float:
        """To answer all samples in one batch, what the device does included."""
        _synchronize(self.loaded.device)
        started = time.perf_counter()
        self.answers(samples, max_new_tokens)
        _synchronize(self.loaded.device)
        return time.perf_counter() - started


def speed(
    subject: Subject, models: Mapping[str, LoadedModel], samples: Sequence[EncodedSample]
) -> dict[str, dict[str, Any]]:
    """Prefill, a decode step and tokens a second of each model; where there are several they take turns."""
    max_new_tokens = subject.sizes.max_new_tokens
    sides = {name: Side(model, samples) for name, model in models.items()}
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(subject.sizes.rounds):
        for name, side in sides.items():
            pairs[name].append((side.seconds(samples, 1), side.seconds(samples, max_new_tokens)))
    return {
        name: {
            "prefill, s": [first for first, _ in found],
            "decode step, ms": [1000 * (last - first) / (max_new_tokens - 1) for first, last in found],
            "tokens/s": [len(samples) * max_new_tokens / last for _, last in found],
        }
        for name, found in pairs.items()
    }


def attention(model: LoadedModel, samples: Sequence[EncodedSample]) -> dict[str, Any]:
    """Attention operators and kernels of one prefill, with how often each ran."""
    on_gpu = model.device.type == "cuda"
    side = Side(model, samples)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as watched:
        side.answers(samples, 1)
    counted = {event.key: event.count for event in watched.key_averages()}
    operators = {name: count for name, count in counted.items() if _OPERATOR.search(name)}
    launched = {
        event.key: event.count
        for event in watched.key_averages()
        if event.device_type == DeviceType.CUDA and _KERNEL.search(event.key)
    }
    flash = any(map(_FLASH_KERNEL.search, launched)) if on_gpu else _FLASH_ON_CPU in operators
    return {"flash": flash, "operators": _listed(operators), "kernels": _listed(launched)}


def difference(model: LoadedModel, samples: Sequence[EncodedSample]) -> dict[str, Any]:
    """The largest difference of logits, batch against alone, as a share of the largest logit, while answers agree."""
    samples = capped(samples, 4)
    together = engine(model, max_rows=len(samples)).trace(samples)
    alone = engine(model, max_rows=1).trace(samples)
    shares, same = [], 0
    for one, other in zip(together, alone, strict=True):
        if one is None or other is None:
            raise RuntimeError("a row could not be answered")
        for step, (first, second) in enumerate(zip(one.logits_SV, other.logits_SV, strict=True)):
            shares.append(float((first - second).abs().max() / second.abs().max()))
            if one.tokens[step] != other.tokens[step]:
                break  # from here on the two answer different texts
        same += one.tokens == other.tokens
    return {
        "dtype": model.numerics["dtype"],
        "largest difference": max(shares),
        "answers equal": f"{same} of {len(samples)}",
    }


def num_bytes(model: LoadedModel) -> int:
    """What the weights are stored in."""
    return sum(
        piece.nbytes for weight in (*model.model.parameters(), *model.model.buffers()) for piece in _pieces(weight)
    )


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A quantized weight consists of several tensors."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _pieces(getattr(tensor, name))
    else:
        yield tensor


def _listed(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{name[:80]} x {count}" for name, count in sorted(counted.items(), key=lambda each: -each[1]))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

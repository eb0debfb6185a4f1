"""Where a model computes: the device that was asked for, or all GPUs, and never half on a disk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.device import Placement, check_fits, input_device, placement
from pipeline.vlm.options import DeviceMap, VlmConfig


def place(**options: Any) -> Placement:
    return placement(VlmConfig(path="", **options))


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "xla", "meta"])
def test_a_device_that_does_not_exist_is_a_usage_error(device: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
        place(device=device)


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="this machine has the device")
def test_a_cuda_device_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"vlm\.device=cuda:7: this machine has \d CUDA devices"):
        place(device="cuda:7")


def test_a_cpu_needs_no_device_map() -> None:
    assert place(device="cpu") == Placement(torch.device("cpu"), {})


def test_weights_go_straight_to_a_gpu(gpus: Any) -> None:
    gpus(20, 20)
    assert place(device="cuda:1") == Placement(torch.device("cuda:1"), {"device_map": {"": torch.device("cuda:1")}})


def test_a_device_map_and_a_device_exclude_each_other() -> None:
    with pytest.raises(UsageError, match=r"vlm\.device=cpu names one\. Set one of them"):
        place(device="cpu", device_map=DeviceMap.auto)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with GPUs of so many GiB."""

    def machine(*sizes: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (sizes[index] << 30, sizes[index] << 30))

    return machine


def test_a_device_map_spreads_over_gpus_alone(gpus: Any) -> None:
    gpus(20, 10)
    found = place(device_map=DeviceMap.auto)
    assert found.arguments["device_map"] == "auto"
    assert found.arguments["max_memory"] == {0: int(18.0 * 2**30), 1: 9 << 30}


def test_a_model_larger_than_all_gpus_is_refused_with_both_sizes(gpus: Any) -> None:
    gpus(20, 10)
    found = place(device_map=DeviceMap.auto)
    check_fits(found, 26 << 30)
    with pytest.raises(RunFailed, match=r"weights take 40\.0 GiB, and 2 GPUs have 27\.0 GiB free.*quantization=int8"):
        check_fits(found, 40 << 30)


@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_a_part_that_does_not_fit_is_not_offloaded(gpus: Any, rest: str) -> None:
    gpus(20)
    model = SimpleNamespace(hf_device_map={"model.vision_tower": 0, "model.layers.7": rest})
    with pytest.raises(RunFailed, match=r"does not fit .* 1 of its parts are left over \(model\.layers\.7 \.\.\.\)"):
        input_device(model, place(device_map=DeviceMap.auto))


def test_a_part_on_disk_is_refused_without_gpus_too() -> None:
    model = SimpleNamespace(hf_device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(RunFailed, match="does not fit"):
        input_device(model, Placement(torch.device("cpu"), {"device_map": "auto"}))


def test_inputs_go_to_the_device_of_the_input_embeddings(gpus: Any) -> None:
    gpus(20, 20)
    embeddings = nn.Embedding(4, 4, device="meta")
    model = SimpleNamespace(hf_device_map={"a": 1, "b": 0}, get_input_embeddings=lambda: embeddings)
    assert input_device(model, place(device_map=DeviceMap.auto)) == torch.device("meta")

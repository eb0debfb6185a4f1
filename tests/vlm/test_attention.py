"""The attention kernel: chosen before weights are read, with a reason, and never another one in silence."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import family
from transformers import GotOcr2ForConditionalGeneration

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm import attention
from pipeline.vlm.attention import Kernel, check_kernel, chosen_kernel, kernel_text
from pipeline.vlm.options import Attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLASH = (Attention.flash_attention_2, Attention.flash_attention_3, Attention.flash_attention_4)


def choose(wanted: Attention, model: Any, device: torch.device = CPU, dtype: torch.dtype = torch.bfloat16) -> Kernel:
    return chosen_kernel(wanted, model, device=device, dtype=dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a GPU and these versions of flash attention."""

    def machine(*installed: Attention, capability: tuple[int, int] = (9, 0)) -> None:
        packages = {
            version: dataclasses.replace(package, is_installed=lambda version=version: version in installed)
            for version, package in attention._FLASH.items()
        }
        monkeypatch.setattr(attention, "_FLASH", packages)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return machine


@pytest.fixture
def without_sdpa(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose vision tower knows no kernel but eager, as GOT-OCR2's."""
    model = family("llava").model
    monkeypatch.setattr(type(model.model.vision_tower), "_supports_sdpa", False)
    monkeypatch.setattr(type(model.model.vision_tower), "_supports_flash_attn", False)
    return model


def test_auto_on_a_cpu_is_sdpa_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    kernel = choose(Attention.auto, family("llava").model)
    with caplog.at_level(logging.INFO):
        kernel.log()
    assert kernel.implementation == "sdpa"
    assert caplog.messages == ["attention: sdpa (flash attention needs a CUDA device; this is cpu)"]


@pytest.mark.parametrize("version", FLASH)
def test_auto_takes_the_flash_attention_that_is_installed(gpu: Any, version: Attention) -> None:
    gpu(version)
    kernel = choose(Attention.auto, family("llava").model, CUDA)
    assert kernel.implementation == version.value
    assert "is installed" in kernel.reason


def test_auto_prefers_version_2_of_several(gpu: Any) -> None:
    gpu(*FLASH)
    assert choose(Attention.auto, family("llava").model, CUDA).implementation == "flash_attention_2"


def test_auto_in_float32_is_sdpa(gpu: Any) -> None:
    gpu(*FLASH)
    kernel = choose(Attention.auto, family("llava").model, CUDA, torch.float32)
    assert (kernel.implementation, kernel.reason) == (
        "sdpa",
        "flash attention computes in bfloat16 or float16; vlm.dtype is float32",
    )


def test_auto_leaves_each_part_its_own_kernel_where_one_knows_no_sdpa(without_sdpa: Any) -> None:
    kernel = choose(Attention.auto, without_sdpa)
    assert kernel.implementation is None
    assert kernel.reason.startswith("CLIPVisionModel of this model does not support sdpa")


@pytest.mark.parametrize("wanted", FLASH)
def test_flash_attention_on_a_cpu_is_refused(wanted: Attention) -> None:
    with pytest.raises(
        UsageError, match=rf"{wanted.value} cannot work: .* needs a CUDA device; this is cpu\. Use .*auto"
    ):
        choose(wanted, family("llava").model)


def test_flash_attention_in_float32_is_refused(gpu: Any) -> None:
    gpu(*FLASH)
    with pytest.raises(UsageError, match=r"computes in bfloat16 or float16; vlm\.dtype is float32"):
        choose(Attention.flash_attention_2, family("llava").model, CUDA, torch.float32)


@pytest.mark.parametrize("wanted", FLASH)
def test_a_missing_package_is_named_with_its_extra(gpu: Any, wanted: Attention) -> None:
    gpu()
    with pytest.raises(UsageError, match=r"the package flash-attn(-3|-4)? is not installed .*vlm-batch\[flash\]"):
        choose(wanted, family("llava").model, CUDA)


def test_an_old_gpu_is_refused_with_both_numbers(gpu: Any) -> None:
    gpu(*FLASH, capability=(7, 5))
    with pytest.raises(UsageError, match=r"flash-attn-4 needs a GPU of compute capability 9\.0; this one has 7\.5"):
        choose(Attention.flash_attention_4, family("llava").model, CUDA)


def test_a_part_without_flash_attention_is_named(gpu: Any, without_sdpa: Any) -> None:
    gpu(*FLASH)
    with pytest.raises(UsageError, match="CLIPVisionModel of this model does not support flash attention"):
        choose(Attention.flash_attention_2, without_sdpa, CUDA)


def test_a_part_without_sdpa_is_named(without_sdpa: Any) -> None:
    with pytest.raises(UsageError, match="sdpa cannot work: CLIPVisionModel of this model does not support sdpa"):
        choose(Attention.sdpa, without_sdpa)


def test_a_kernel_that_transformers_would_replace_is_refused(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(*FLASH)
    model = family("llava").model
    only = ["kernels-community/vllm-flash-attn3", "flash_attention_4"]
    monkeypatch.setattr(type(model.model.language_model), "_compatible_flash_implementations", only)
    with pytest.raises(UsageError, match="LlamaModel works with kernels-community/vllm-flash-attn3, flash_attention_4"):
        choose(Attention.flash_attention_2, model, CUDA)
    assert choose(Attention.auto, model, CUDA).implementation == "flash_attention_4"


def test_a_model_that_took_another_kernel_is_refused_after_loading() -> None:
    model = family("llava").model  # has sdpa
    check_kernel(Kernel("sdpa", ""), model)
    check_kernel(Kernel(None, ""), model)
    with pytest.raises(RunFailed, match=r"eager was chosen, but after loading .*'CLIPVisionModel': 'sdpa'"):
        check_kernel(Kernel("eager", ""), model)


def test_the_record_names_the_part_that_differs() -> None:
    model = GotOcr2ForConditionalGeneration._from_config(small_got_ocr2())
    assert kernel_text(model.model.language_model) == "sdpa"
    assert kernel_text(model) == (
        "eager (GotOcr2ForConditionalGeneration GotOcr2Model GotOcr2VisionEncoder), sdpa (Qwen2Model)"
    )
    assert choose(Attention.auto, model).implementation is None


def small_got_ocr2() -> Any:
    from transformers import GotOcr2Config

    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    return GotOcr2Config(vision_config=vision | {"image_size": 64, "mlp_dim": 32}, text_config=text, pad_token_id=0)


def test_a_model_of_one_part_is_recorded_by_its_configuration() -> None:
    plain = SimpleNamespace(modules=lambda: iter(()), config=SimpleNamespace(_attn_implementation="eager"))
    assert kernel_text(plain) == "eager"

"""Loading: arithmetic, device and kernel as asked, and never a random weight."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EOS, PAD, batch_of_one, family, samples, tokenizer

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.identity import identify
from pipeline.vlm.load import LoadedModel, check_model, load_model
from pipeline.vlm.options import Attention, DeviceMap, Dtype, Quantization, QuantizationBackend, VlmConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    family("llava").model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(autouse=True)
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def loaded(folder: Path, num_threads: int = 2, **options: object) -> LoadedModel:
    config = VlmConfig(path=str(folder), **({"device": "cpu"} | options))  # type: ignore[arg-type]
    return load_model(config, identify(config), num_threads=num_threads)


def test_a_saved_model_loads_as_it_was(folder: Path) -> None:
    found = loaded(folder)
    sample = batch_of_one(samples("llava", 1)[0])
    with torch.inference_mode():
        assert torch.equal(found.model(**sample).logits, family("llava").model(**sample).logits)
    assert not found.model.training
    assert (found.eos_ids, found.pad_id, found.is_encoder_decoder) == ((EOS,), PAD, False)
    assert found.numerics == {"device": "cpu", "dtype": "float32", "attention": "sdpa", "torch": torch.__version__}


@pytest.mark.parametrize("dtype", [Dtype.bfloat16, Dtype.float16])
def test_weights_are_in_the_arithmetic_that_was_asked_for(folder: Path, dtype: Dtype) -> None:
    found = loaded(folder, dtype=dtype)
    assert {weight.dtype for weight in found.model.parameters()} == {getattr(torch, dtype.value)}


def test_the_attention_kernel_is_the_one_that_was_asked_for(folder: Path) -> None:
    assert loaded(folder, attn_implementation=Attention.eager).numerics["attention"] == "eager"


def test_a_kernel_that_is_not_installed_is_refused_when_it_was_asked_for(folder: Path) -> None:
    with pytest.raises(UsageError, match="flash_attention_2 cannot work: flash attention needs a CUDA device"):
        loaded(folder, attn_implementation=Attention.flash_attention_2)


def test_a_tiny_model_computes_with_one_thread(folder: Path) -> None:
    loaded(folder, num_threads=2)
    assert torch.get_num_threads() == 1


def copied(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a model folder, some of its configuration changed."""
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    content = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(content))
    return to


def changed_weights(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    weights = load_file(copied(folder, to) / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


def test_weights_that_are_lacking_are_refused_instead_of_random(folder: Path, tmp_path: Path) -> None:
    """Fault 47: weights that are lacking are named; none is left random."""

    def leave_out(weights: dict[str, torch.Tensor]) -> None:
        del weights[next(name for name in sorted(weights) if "layers.1.mlp" in name)]

    with pytest.raises(RunFailed, match=r"lack 1 weights of the model: \['[a-z_.]*layers\.1\.mlp"):
        loaded(changed_weights(folder, tmp_path, leave_out))


def test_weights_of_another_shape_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    def widen(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(weights) if "layers.1.mlp.up_proj" in name)
        weights[name] = torch.zeros(65, 32)

    with pytest.raises(
        RunFailed,
        match=r"1 weights in .* have other shapes.*layers\.1\.mlp\.up_proj\.weight: \(65, 32\), not \(64, 32\)",
    ):
        loaded(changed_weights(folder, tmp_path, widen))


def test_weights_that_the_model_has_no_place_for_are_named_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["model.language_model.extra.weight"] = torch.zeros(1)

    loaded(changed_weights(folder, tmp_path, add))
    (message,) = [record.getMessage() for record in caplog.records if record.name == "pipeline.vlm.load"]
    assert "1 weights in" in message
    assert "extra.weight" in message


def test_auto_computes_in_what_the_identity_says(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    text = content["text_config"] | {"dtype": "bfloat16"}
    copied(folder, tmp_path, dtype=None, text_config=text)
    assert identify(VlmConfig(path=str(tmp_path))).dtype == "bfloat16"
    assert {weight.dtype for weight in loaded(tmp_path).model.parameters()} == {torch.bfloat16}


def test_pickled_weights_load_when_that_was_allowed(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(RunFailed, match="allow_pickle=true"):
        loaded(tmp_path)
    found = loaded(tmp_path, allow_pickle=True)
    sample = batch_of_one(samples("llava", 1)[0])
    with torch.inference_mode():
        assert torch.equal(found.model(**sample).logits, family("llava").model(**sample).logits)


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_in_it_does_not_run_it(folder: Path, tmp_path: Path) -> None:
    """Fault S-3: vlm.allow_pickle=true takes weights out of a pickle, and nothing else."""
    copied(folder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": Canary(tmp_path / "touched")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RunFailed, match="cannot be loaded"):
        loaded(tmp_path, allow_pickle=True)
    assert not (tmp_path / "touched").exists()


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(RunFailed, match=r"the tokenizer in .* cannot be loaded"):
        loaded(tmp_path)


def test_device_map_auto_loads_the_same_model(folder: Path) -> None:
    found = loaded(folder, device="auto", device_map=DeviceMap.auto)
    sample = {name: tensor.to(found.device) for name, tensor in batch_of_one(samples("llava", 1)[0]).items()}
    with torch.inference_mode():
        logits = found.model(**sample).logits.cpu()
        assert torch.allclose(logits, family("llava").model(**batch_of_one(samples("llava", 1)[0])).logits, atol=1e-4)
    assert found.device == found.model.get_input_embeddings().weight.device


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attn_implementation": Attention.flash_attention_2}, "flash_attention_2 cannot work"),
        ({"device": "cuda:99"}, "this machine has"),
        ({"quantization": Quantization.float8, "quantization_backend": QuantizationBackend.bitsandbytes}, "float8"),
        ({"device_map": DeviceMap.auto}, "Set one of them"),
    ],
)
def test_what_cannot_work_is_refused_without_reading_weights(
    folder: Path, tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    options = VlmConfig(path=str(folder), **({"device": "cpu"} | option))
    identity = identify(options)
    missing = dataclasses.replace(identity, folder=copied(folder, tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=message):
        check_model(options, missing)


def test_a_sound_model_passes_the_check_without_reading_weights(folder: Path, tmp_path: Path) -> None:
    options = VlmConfig(path=str(folder), device="cpu", quantization=Quantization.int8)
    identity = dataclasses.replace(identify(options), folder=copied(folder, tmp_path))
    (tmp_path / "model.safetensors").unlink()
    check_model(options, identity)

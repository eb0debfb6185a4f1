"""Loading: arithmetic, device and kernel as asked, and never a random weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EOS, PAD, batch_of_one, family, samples, tokenizer

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.identity import identify
from pipeline.vlm.load import LoadedModel, load_model
from pipeline.vlm.options import Attention, Dtype, VlmConfig


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
    with pytest.raises(RunFailed, match="FlashAttention2"):
        loaded(folder, attn_implementation=Attention.flash_attention_2)


def test_a_tiny_model_computes_with_one_thread(folder: Path) -> None:
    loaded(folder, num_threads=2)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_a_device_that_does_not_exist_is_a_usage_error(folder: Path, device: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
        loaded(folder, device=device)


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="this machine has the device")
def test_a_cuda_device_that_is_not_there_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"vlm\.device=cuda:7: this machine has \d CUDA devices"):
        loaded(folder, device="cuda:7")


def test_weights_that_are_lacking_are_refused_instead_of_random(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    left_out = next(name for name in sorted(weights) if "layers.1.mlp" in name)
    kept = {name: weight for name, weight in weights.items() if name != left_out}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunFailed, match=r"lack 1 weights of the model: \['[a-z_.]*layers\.1\.mlp"):
        loaded(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunFailed, match="cannot be loaded"):
        loaded(tmp_path)


def test_a_model_with_code_of_its_own_is_refused_unless_it_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('code of the model ran')")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunFailed, match="trust_remote_code"):
        loaded(tmp_path)

"""Quantized weights: of the language model alone, as small as is said, and nearly as right."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import ARCHITECTURES, batch_of_one, family, samples, tokenizer
from torch import nn

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.identity import identify
from pipeline.vlm.load import LoadedModel, load_model
from pipeline.vlm.options import Dtype, Quantization, QuantizationBackend, VlmConfig
from pipeline.vlm.quantize import check_quantization, quantized_names, quantized_weights

CHECKOUT = Path(__file__).resolve().parents[2]
INT8, INT4, FLOAT8 = Quantization.int8, Quantization.int4, Quantization.float8
BITSANDBYTES = QuantizationBackend.bitsandbytes
FORMATS = [
    (INT8, QuantizationBackend.quanto),
    (INT4, QuantizationBackend.quanto),
    (FLOAT8, QuantizationBackend.quanto),
    (INT8, BITSANDBYTES),
    (INT4, BITSANDBYTES),
]


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in ARCHITECTURES:
        made[name] = tmp_path_factory.mktemp(name)
        family(name).model.save_pretrained(made[name])
        tokenizer().save_pretrained(made[name])
    return made


def load(path: Path | str, quantization: Quantization, **options: Any) -> LoadedModel:
    if options.get("quantization_backend") is BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    config = VlmConfig(path=str(path), quantization=quantization, device="cpu", **options)
    return load_model(config, identify(config), num_threads=1)


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize(("quantization", "backend"), FORMATS)
def test_the_demo_model_loads_and_shrinks_in_every_format(
    quantization: Quantization, backend: QuantizationBackend, dtype: Dtype
) -> None:
    found = load("demo", quantization, quantization_backend=backend, dtype=dtype)
    plain = load("demo", Quantization.none, dtype=dtype)
    made = found.quantized
    assert made is not None
    assert plain.quantized is None
    assert made.num_modules == 3 * 7
    full = sum(weight.nbytes for weight in {*plain.model.parameters(), *plain.model.buffers()})
    assert full <= made.full_size_bytes <= 1.001 * full  # Quanto adds two numbers to each layer
    # 3 layers of 4 * 128 * 128 + 3 * 128 * 384 weights; scales and the like take less than an eighth of them.
    quantized = 3 * (4 * 128 * 128 + 3 * 128 * 384)
    itemsize = plain.model.dtype.itemsize
    saved = quantized * (itemsize - (0.5 if quantization is INT4 else 1))
    assert saved - quantized / 8 < made.full_size_bytes - made.size_bytes <= saved
    assert found.model.dtype == plain.model.dtype
    assert made.kind in found.numerics["quantization"]
    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.inference_mode():
        logits, plain_logits = (each.model(input_ids=ids).logits.float() for each in (found, plain))
    assert torch.nn.functional.cosine_similarity(logits, plain_logits, dim=-1).min() > (
        0.8 if quantization is INT4 else 0.99
    )
    assert not torch.equal(logits, plain_logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("quantization", [INT8, INT4, FLOAT8])
def test_only_the_language_model_is_quantized(
    folders: dict[str, Path], architecture: str, quantization: Quantization
) -> None:
    from optimum.quanto import QModuleMixin

    found = load(folders[architecture], quantization)
    decoder = found.model.get_decoder()
    names = {name for name, module in found.model.named_modules() if isinstance(module, QModuleMixin)}
    inside = {id(module) for module in decoder.modules()}
    linear = {name for name, module in found.model.named_modules() if isinstance(module, nn.Linear)}
    assert names == {name for name in linear if id(found.model.get_submodule(name)) in inside}
    assert names < linear  # vision tower, projector and head have some, too
    assert not isinstance(found.model.get_output_embeddings(), QModuleMixin)
    sample = batch_of_one(samples(architecture, 1)[0])
    with torch.inference_mode():
        tokens = found.model.generate(**sample, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > sample["input_ids"].shape[1]


def test_the_vision_tower_is_quantized_when_that_was_asked_for(folders: dict[str, Path]) -> None:
    from optimum.quanto import QModuleMixin

    found = load(folders["llava"], INT8, quantize_vision=True)
    assert isinstance(found.model.model.multi_modal_projector.linear_1, QModuleMixin)
    assert any(isinstance(module, QModuleMixin) for module in found.model.model.vision_tower.modules())
    assert not isinstance(found.model.lm_head, QModuleMixin)


def test_a_vision_tower_inside_the_decoder_stays_as_it_is() -> None:
    from transformers import GitConfig, GitForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = GitForCausalLM(GitConfig(**sizes, vision_config=sizes | {"image_size": 32}, vocab_size=100))
    names = quantized_names(VlmConfig(path="", quantization=INT8), model)
    assert any(name.startswith("git.encoder.layer.0") for name in names)
    assert not [name for name in names if "image_encoder" in name or "visual_projection" in name or name == "output"]


def test_a_head_of_more_rows_than_there_are_tokens_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llava").model
    monkeypatch.setattr(model.config.text_config, "vocab_size", model.lm_head.out_features - 7)
    names = quantized_names(VlmConfig(path="", quantization=INT8, quantize_vision=True), model)
    assert "model.multi_modal_projector.linear_1" in names
    assert "lm_head" not in names


def test_what_the_class_keeps_in_float32_is_not_quantized(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(family("llava").model), "_keep_in_fp32_modules", ["model.multi_modal_projector"])
    found = load(folders["llava"], INT8, quantize_vision=True)
    assert type(found.model.model.multi_modal_projector.linear_1) is nn.Linear


def test_a_head_that_the_class_does_not_declare_stays_as_it_is() -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BlipConfig(text_config=sizes | {"vocab_size": 100, "encoder_hidden_size": 32}, vision_config=sizes)
    model = BlipForConditionalGeneration(config)
    assert model.get_output_embeddings() is None
    names = quantized_names(VlmConfig(path="", quantization=INT8), model)
    assert names
    assert not [name for name in names if name.endswith("predictions.decoder") or "vision" in name]


def test_the_line_in_the_log_has_format_package_and_bytes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline.vlm.quantize"):
        made = load("demo", INT8).quantized
    assert made is not None
    (line,) = caplog.messages
    assert line.startswith("quantization: int8 (optimum-quanto 0.")
    assert "21 linear layers; the weights take " in line
    assert f"{made.size_bytes / 1e6:.1f} MB, unquantized they would take {made.full_size_bytes / 1e6:.1f} MB" in line


def test_int4_needs_no_compiler(folders: dict[str, Path], tmp_path: Path) -> None:
    script = (
        "import sys, torch; from pathlib import Path; sys.path.insert(0, 'tests/vlm')\n"
        "from pipeline.vlm.identity import identify; from pipeline.vlm.load import load_model\n"
        "from pipeline.vlm.options import *\n"
        "c = VlmConfig(path=sys.argv[1], quantization=Quantization.int4, device='cpu')\n"
        "m = load_model(c, identify(c), num_threads=1).model\n"
        "print(m(input_ids=torch.tensor([[1, 5, 6]])).logits.isfinite().all().item())"
    )
    environment = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folders["llava"])],
        cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("backend", list(QuantizationBackend))
def test_a_missing_package_is_named_with_its_extra(
    backend: QuantizationBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(UsageError, match=rf"int8 needs the package .*pip install 'vlm-batch\[{backend.value}\]'"):
        check_quantization(VlmConfig(path="", quantization=INT8, quantization_backend=backend))


def test_float8_with_bitsandbytes_is_refused() -> None:
    with pytest.raises(UsageError, match="bitsandbytes has int8 and int4 alone"):
        check_quantization(VlmConfig(path="", quantization=FLOAT8, quantization_backend=BITSANDBYTES))


def test_a_setting_that_would_quantize_nothing_is_refused() -> None:
    bare = nn.Module()
    model = SimpleNamespace(
        get_decoder=lambda: bare,
        get_output_embeddings=lambda: None,
        _keep_in_fp32_modules=None,
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=5)),
        named_modules=bare.named_modules,
    )
    with pytest.raises(UsageError, match="has no linear layer in its language model"):
        quantized_names(VlmConfig(path="", quantization=INT8), model)


def test_layers_that_were_left_out_are_noticed() -> None:
    found = load("demo", INT8)
    names = [name for name, module in found.model.named_modules() if "self_attn.q_proj" in name]
    with pytest.raises(RunFailed, match=r"expected \d+ quantized layers, and found 21"):
        quantized_weights(VlmConfig(path="demo", quantization=INT8), found.model, names, torch.float32)


def test_weights_that_are_quantized_already_are_not_quantized_again(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = quantized_checkpoint(folders["llava"], tmp_path / "awq")
    with pytest.raises(UsageError, match=r"quantized already \(awq in config\.json\)\. Use vlm\.quantization=none"):
        identify(VlmConfig(path=str(folder), quantization=INT8))


def test_the_package_of_weights_that_are_quantized_already_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = quantized_checkpoint(folders["llava"], tmp_path / "awq")
    with pytest.raises(RunFailed, match=r"weights are quantized: awq\) cannot be loaded: .*gptqmodel"):
        load(folder, Quantization.none)


def quantized_checkpoint(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of the demo by the command line: share of right answers of its first rows, and the settings."""

    def run(num_rows: int, *words: str) -> tuple[float, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("run")
        command = [sys.executable, "-m", "pipeline", "run", "dataset=demo", f"output_dir={folder}"]
        subprocess.run([*command, f"dataset.max_rows={num_rows}", *words], cwd=CHECKOUT, check=True, timeout=200)
        table = pq.read_table(folder / "data", columns=["answer", "response", "status"])
        assert set(table["status"].to_pylist()) == {"ok"}
        share = pc.mean(pc.equal(table["response"], table["answer"]).cast("float64")).as_py()
        return share, json.loads((folder / "plan.json").read_text())

    return run


@pytest.mark.slow
def test_int8_answers_the_demo_within_a_point_of_float32(accuracy: Any) -> None:
    full, full_plan = accuracy(400)
    int8, int8_plan = accuracy(400, "vlm.quantization=int8")
    assert full > 0.97
    assert abs(int8 - full) <= 0.01
    assert full_plan["fingerprint"] != int8_plan["fingerprint"]


def test_a_run_in_int4_answers_every_row(accuracy: Any) -> None:
    share, _ = accuracy(50, "vlm.quantization=int4")
    assert share > 0.8

"""The class behind a folder: another kind of model, or code that nobody trusted, is refused without reading weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import family, tokenizer

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.architecture import model_class, model_config, skeleton
from pipeline.vlm.identity import ModelIdentity, identify
from pipeline.vlm.load import load_model
from pipeline.vlm.options import VlmConfig


def identity_of(folder: Path, **config: Any) -> ModelIdentity:
    """A folder with nothing but this configuration."""
    (folder / "config.json").write_text(json.dumps(config))
    return ModelIdentity(str(folder), None, folder, {}, "float32", config, {})


def refused(folder: Path, **config: Any) -> str:
    options = VlmConfig(path=str(folder))
    with pytest.raises(RunFailed) as caught:
        skeleton(options, identity_of(folder, **config), model_config(options, identity_of(folder, **config)))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["bert", "llama", "clip", "siglip", "whisper"])
def test_a_model_of_another_kind_is_refused_by_its_type(tmp_path: Path, kind: str) -> None:
    message = refused(tmp_path, model_type=kind, architectures=["Something"])
    assert f"model_type '{kind}' (architectures: ['Something']) is no image-text-to-text model" in message


def test_a_model_of_another_kind_is_refused_before_the_data_is_looked_at(
    tmp_path: Path, vlm_batch: Callable[..., Any]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    words = ("run", "vlm=auto", f"vlm.path={tmp_path}", "dataset=images", "dataset.path=nowhere", "output_dir=out")
    assert "model_type 'llama'" in vlm_batch(*words, code=1).stderr
    assert not (tmp_path / "out").exists()


def test_a_type_that_transformers_does_not_know_asks_for_a_newer_one(tmp_path: Path) -> None:
    assert "knows no model_type 'of_tomorrow'. Install a newer transformers" in refused(
        tmp_path, model_type="of_tomorrow"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": "wide"}},
        {"model_type": "llava", "text_config": 3},
    ],
)
def test_a_configuration_of_wrong_types_is_named(tmp_path: Path, config: dict[str, Any]) -> None:
    assert "config.json is no configuration of a model" in refused(tmp_path, **config)


def test_a_configuration_that_makes_no_model_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, model_type="chameleon")  # without its vocabulary_map
    assert "config.json does not make a ChameleonForConditionalGeneration: AttributeError" in message


def test_a_skeleton_has_every_module_and_no_weights(tmp_path: Path) -> None:
    model = family("smolvlm").model
    model.save_pretrained(tmp_path)
    options = VlmConfig(path=str(tmp_path))
    identity = dataclasses.replace(identify(options), dtype="bfloat16")
    bones = skeleton(options, identity, model_config(options, identity))
    assert [name for name, _ in bones.named_modules()] == [name for name, _ in model.named_modules()]
    assert {(weight.device.type, weight.dtype) for weight in bones.parameters()} == {("meta", torch.bfloat16)}


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole model of a type of its own, whose class comes with it."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    model = family("llava").model
    model.save_pretrained(folder)
    # Under the names of the class: those of the file are changed on loading for the types that transformers knows.
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Mine"]}
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        "from transformers import LlavaConfig, LlavaForConditionalGeneration\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class MyConfig(LlavaConfig):\n    model_type = 'mine'\n"
        "class Mine(LlavaForConditionalGeneration):\n    config_class = MyConfig\n"
    )
    return folder


def test_code_of_the_model_is_not_run_unless_it_is_trusted(
    own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 47, S-3: code that comes with a model (auto_map) is not run unless it is trusted; the refusal names it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question on the terminal"))
    options = VlmConfig(path=str(own_code))
    with pytest.raises(UsageError, match=r"mine\.Mine, mine\.MyConfig.*vlm\.trust_remote_code=true"):
        model_config(options, identify(options))
    assert not (tmp_path / "ran").exists()


def test_code_of_the_model_runs_when_it_is_trusted_and_says_so(
    own_code: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = VlmConfig(path=str(own_code), device="cpu", trust_remote_code=True)
    identity = identify(options)
    assert "mine.py" in identity.files
    found = load_model(options, identity, num_threads=1)
    assert (tmp_path / "ran").exists()
    assert type(found.model).__name__ == "Mine"
    messages = [record.getMessage() for record in caplog.records if record.name == "pipeline.vlm.load"]
    assert messages == ["running Python code that came with the model: mine.Mine, mine.MyConfig"]


def test_a_known_type_needs_no_code_of_its_own(tmp_path: Path) -> None:
    """Many folders of models that transformers knows by now still name the code of before."""
    options = VlmConfig(path=str(tmp_path))
    identity = identity_of(tmp_path, model_type="qwen2_vl", auto_map={"AutoModel": "old.Qwen"})
    assert model_class(options, identity, model_config(options, identity)).__name__ == "Qwen2VLForConditionalGeneration"


def test_the_answering_class_of_a_text_model_with_trusted_code_is_its_own(own_code: Path) -> None:
    options = VlmConfig(path=str(own_code), trust_remote_code=True)
    identity = identify(options)
    assert model_class(options, identity, model_config(options, identity)).__name__ == "Mine"

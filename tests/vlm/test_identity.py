"""Which model it is: a folder that is not whole is refused by name before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.identity import ModelIdentity, identify
from pipeline.vlm.options import VlmConfig

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlm-batch" / "sha256.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of one weight file."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llava", "text_config": {"max_position_embeddings": 2048}})
    )
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.2}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("A model.")
    save_file({"a": np.zeros((4, 4), np.float32), "b": np.ones(3, np.float32)}, folder / "model.safetensors")
    return folder


def identity_of(folder: Path) -> ModelIdentity:
    return identify(VlmConfig(path=str(folder)))


def test_a_model_is_known_by_the_content_of_its_files(folder: Path) -> None:
    identity = identity_of(folder)
    assert sorted(identity.files) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    weights = (folder / "model.safetensors").read_bytes()
    assert identity.files["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert identity.max_tokens == 2048
    assert identity.generation_config == {"temperature": 0.2}


def test_what_changes_answers_changes_the_settings_and_a_readme_does_not(folder: Path) -> None:
    before = identity_of(folder).settings
    (folder / "README.md").write_text("The same model, better described.")
    assert identity_of(folder).settings == before
    (folder / "chat_template.jinja").write_text("{{ messages | reverse }}")
    after = identity_of(folder).settings
    assert [name for name in before if before[name] != after[name]] == ["vlm.files.chat_template.jinja"]


def test_a_copy_elsewhere_has_the_same_settings(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert identity_of(other).settings == identity_of(folder).settings


def test_hashes_are_remembered_until_the_file_changes(folder: Path, cache: Path) -> None:
    identity_of(folder)
    remembered = json.loads(cache.read_text())
    cache.write_text(json.dumps(dict.fromkeys(remembered, "remembered")))
    assert set(identity_of(folder).files.values()) == {"remembered"}
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    again = identity_of(folder).files
    assert again.pop("model.safetensors") == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert set(again.values()) == {"remembered"}


def test_a_damaged_or_unwritable_cache_only_costs_time(folder: Path, cache: Path) -> None:
    files = identity_of(folder).files
    cache.write_text("{torn")
    assert identity_of(folder).files == files
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_text("a file where the folder should be")
    assert identity_of(folder).files == files


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "~/nowhere/at/all"])
def test_a_missing_folder_is_named(path: str) -> None:
    with pytest.raises(UsageError, match=f"{path}: no such folder"):
        identify(VlmConfig(path=path))


def test_a_file_is_no_model_folder(folder: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        identity_of(folder / "config.json")


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"vlm\.revision=v2: .* is a folder, which has no revisions"):
        identify(VlmConfig(path=str(folder), revision="v2"))


def test_a_folder_without_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(RunFailed, match=r"no config\.json.*photo\.jpg"):
        identity_of(tmp_path)


@pytest.mark.parametrize("content", ["{torn", "\xff\xfe"])
def test_a_damaged_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RunFailed, match=r"config\.json cannot be read as JSON"):
        identity_of(folder)


def test_a_configuration_without_a_type_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(RunFailed, match=r"config\.json has no model_type"):
        identity_of(folder)


def test_parts_of_a_processor_in_folders_of_their_own_count(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "qformer_tokenizer").mkdir()
    (folder / "qformer_tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "checkpoint-100").mkdir()  # left over from training
    (folder / "checkpoint-100" / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-100" / "optimizer.pt").touch()
    before = identity_of(folder)
    assert {name for name in before.files if "/" in name} == {
        "additional_chat_templates/tools.jinja",
        "qformer_tokenizer/tokenizer.json",
    }
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tool }}")
    assert identity_of(folder).settings != before.settings


def test_weights_that_are_not_read_are_not_hashed(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "pytorch_model.bin").touch()
    assert {name for name in identity_of(folder).files if "model" in name or "consol" in name} == {"model.safetensors"}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": None, "text_config": {"dtype": "float16"}}, "float16"),
        ({"dtype": "auto"}, "float32"),
        ({}, "float32"),
    ],
)
def test_the_dtype_is_what_the_checkpoint_says(folder: Path, config: dict[str, Any], dtype: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"} | config))
    assert identity_of(folder).dtype == dtype
    assert identity_of(folder).settings["vlm.dtype"] == dtype


def test_the_dtype_of_a_checkpoint_that_does_not_say_is_that_of_most_weights(folder: Path) -> None:
    weights = {"norm": np.zeros(3, np.float32), "up": np.zeros((8, 8), np.float16), "ids": np.zeros(99, np.int64)}
    save_file(weights, folder / "model.safetensors")
    assert identity_of(folder).dtype == "float16"


def max_tokens(**config: Any) -> int | None:
    return ModelIdentity("", None, Path(), {}, "float32", config, {}).max_tokens


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"text_config": {}}, None),
        ({"text_config": {"max_position_embeddings": None}}, None),
        ({"max_position_embeddings": 512}, 512),
        ({"text_config": {"max_position_embeddings": 4096}, "max_position_embeddings": 77}, 4096),
        ({"thinker_config": {"text_config": {"max_position_embeddings": 32768}}}, 32768),
        ({"is_encoder_decoder": True, "text_config": {"max_position_embeddings": 1024}}, 2048),
    ],
)
def test_the_context_is_that_of_the_language_model(config: dict[str, Any], expected: int | None) -> None:
    assert max_tokens(**config) == expected


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"rope_type": "dynamic", "factor": 2.0}, 65536),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4096}, 32768),
        ({"rope_type": "default"}, 32768),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, 32768),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding": {"rope_type": "default"}}, 262144),
    ],
)
def test_a_stretched_rotary_embedding_reaches_further(rope: dict[str, Any], expected: int) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        assert max_tokens(text_config={"max_position_embeddings": 32768, name: rope}) == expected


def test_the_context_is_never_less_than_transformers_says_for_any_of_its_models() -> None:
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    num_compared = 0
    for config_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        config = config_class()
        truth = getattr(config.get_text_config(), "max_position_embeddings", None)
        found = max_tokens(**json.loads(config.to_json_string(use_diff=False)))
        if truth is not None and found is not None:
            num_compared += 1
            assert found >= truth, config_class
    assert num_compared > 70


def test_a_model_is_identified_without_torch(folder: Path) -> None:
    script = (
        "import sys; from pipeline.vlm.identity import identify; from pipeline.vlm.options import VlmConfig;"
        "identify(VlmConfig(path=sys.argv[1]));"
        "sys.exit(', '.join({'torch', 'transformers', 'datasets'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=CHECKOUT, check=True)

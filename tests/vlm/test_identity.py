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
    (folder / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 2048}}))
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


def test_a_folder_without_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(RunFailed, match=r"no config\.json.*photo\.jpg"):
        identity_of(tmp_path)


@pytest.mark.parametrize("content", ["{torn", "\xff\xfe"])
def test_a_damaged_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RunFailed, match=r"config\.json cannot be read as JSON"):
        identity_of(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunFailed, match="no weights"):
        identity_of(folder)


def test_pickled_weights_alone_are_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RunFailed, match=r"pytorch_model\.bin.*may run code.*safetensors"):
        identity_of(folder)


def weights_cut_at(place: str, whole: bytes) -> bytes:
    header_bytes = int.from_bytes(whole[:8], "little")
    return whole[
        : {"zero": 0, "length": 5, "header": 8 + header_bytes // 2, "middle": 8 + header_bytes + 20}.get(place, -1)
    ]


@pytest.mark.parametrize("place", ["zero", "length", "header", "middle", "last byte"])
def test_a_cut_weight_file_is_named(folder: Path, place: str) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights_cut_at(place, weights.read_bytes()))
    with pytest.raises(RunFailed, match=r"model\.safetensors (is cut off|has \d+ bytes).*Download it again"):
        identity_of(folder)


@pytest.mark.parametrize("header", [b"{torn   ", b"[1,2,3] ", b'{"a":1} ', b"        "])
def test_a_damaged_weight_header_is_named(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(RunFailed, match=r"model\.safetensors has a damaged header"):
        identity_of(folder)


def test_a_weight_file_longer_than_promised_is_named(folder: Path) -> None:
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(RunFailed, match=r"model\.safetensors has \d+ bytes, its header promises"):
        identity_of(folder)


def test_an_index_that_lists_an_absent_file_is_named(folder: Path) -> None:
    index: dict[str, Any] = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        RunFailed, match=r"index\.json lists \['model-00002-of-00002\.safetensors'\], which are missing"
    ):
        identity_of(folder)


def test_a_model_is_identified_without_torch(folder: Path) -> None:
    script = (
        "import sys; from pipeline.vlm.identity import identify; from pipeline.vlm.options import VlmConfig;"
        "identify(VlmConfig(path=sys.argv[1]));"
        "sys.exit(', '.join({'torch', 'transformers', 'datasets'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=CHECKOUT, check=True)

"""A model folder that is not whole is refused by the name of the file before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import RunFailed
from pipeline.vlm.checkpoint import weight_files
from pipeline.vlm.identity import identify
from pipeline.vlm.options import VlmConfig

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4910000000\n"


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of one weight file."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": np.zeros((4, 4), np.float32), "b": np.ones(3, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same in two files and an index."""
    (folder / "model.safetensors").unlink()
    save_file({"a": np.zeros((4, 4), np.float32)}, folder / SHARDS[0])
    save_file({"b": np.ones(8, np.float32)}, folder / SHARDS[1])
    index(folder, {"a": SHARDS[0], "b": SHARDS[1]})
    return folder


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(RunFailed) as caught:
        identify(VlmConfig(path=str(folder), **options))
    return str(caught.value)


def test_a_whole_folder_names_the_files_that_are_read(folder: Path) -> None:
    (folder / "consolidated.safetensors").touch()
    assert weight_files(folder, {}, allow_pickle=False) == [folder / "model.safetensors"]


def test_a_whole_sharded_folder_names_its_shards(sharded: Path) -> None:
    assert weight_files(sharded, {}, allow_pickle=False) == [sharded / name for name in SHARDS]


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    """Fault 47: a model folder without weights is refused before data is read."""
    (folder / "model.safetensors").unlink()
    assert "has no weights (model.safetensors or model.safetensors.index.json)" in refusal(folder)


def weights_cut_at(place: str, whole: bytes) -> bytes:
    header_bytes = int.from_bytes(whole[:8], "little")
    return whole[
        : {"zero": 0, "length": 5, "header": 8 + header_bytes // 2, "middle": 8 + header_bytes + 20}.get(place, -1)
    ]


@pytest.mark.parametrize("place", ["zero", "length", "header", "middle", "last byte"])
@pytest.mark.parametrize("name", ["model.safetensors", SHARDS[1]])
def test_a_cut_weight_file_is_named(folder: Path, name: str, place: str, request: pytest.FixtureRequest) -> None:
    """Fault 47: a weight file cut at 0, in its header, its middle or its last byte is named, with both sizes."""
    if name in SHARDS:
        request.getfixturevalue("sharded")
    weights = folder / name
    weights.write_bytes(weights_cut_at(place, weights.read_bytes()))
    message = refusal(folder)
    assert f"{name} is cut off" in message or f"{name} has {weights.stat().st_size} bytes, its header" in message
    assert "Download it again" in message


@pytest.mark.parametrize("header", [b"{torn   ", b"[1,2,3] ", b'{"a":1} ', b"        "])
def test_a_damaged_weight_header_is_named(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "model.safetensors has a damaged header" in refusal(folder)


def test_a_weight_file_longer_than_promised_is_named(folder: Path) -> None:
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"more")
    assert "bytes, its header promises" in refusal(folder)


def test_an_index_that_lists_an_absent_file_is_named(sharded: Path) -> None:
    """Fault 47: an index that lists an absent file: both are named."""
    (sharded / SHARDS[1]).unlink()
    assert f"model.safetensors.index.json lists ['{SHARDS[1]}'], which are missing" in refusal(sharded)


def test_an_index_whose_weights_are_not_in_the_files_is_named(sharded: Path) -> None:
    index(sharded, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]})
    message = refusal(sharded)
    assert f"{SHARDS[0]} lacks 1 weights that model.safetensors.index.json says it has: ['b']" in message


@pytest.mark.parametrize("weight_map", [None, {}, ["a"], 7])
def test_an_index_without_a_map_is_named(sharded: Path, weight_map: Any) -> None:
    index(sharded, weight_map)
    assert "index.json has no weight_map" in refusal(sharded)


@pytest.mark.parametrize("content", ["{torn", "[1]", ""])
def test_a_damaged_index_is_named(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json cannot be read as JSON" in refusal(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_asks_for_a_pull(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    message = refusal(folder)
    assert f"{name} is a pointer of git-lfs" in message
    assert "git lfs pull" in message


def test_a_link_into_nothing_is_named(folder: Path) -> None:
    """A snapshot of the hub's cache whose blob was deleted."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/4d7a")
    assert "model.safetensors is a link to ../../blobs/4d7a, which is not there" in refusal(folder)


@pytest.mark.parametrize("place", [".", ".cache/huggingface/download", ".cache/huggingface/download/onnx"])
def test_a_download_that_has_not_ended_is_named(folder: Path, place: str) -> None:
    """Fault 47: a download that has not ended (.incomplete) is named."""
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / place / "model.safetensors.4d7a.incomplete").touch()
    assert "model.safetensors.4d7a.incomplete: this download has not ended" in refusal(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-Q4_K_M.gguf"], "only in GGUF (model-Q4_K_M.gguf)"),
        (["onnx/decoder.onnx"], "only in ONNX (onnx/decoder.onnx)"),
        (["consolidated.safetensors"], "['consolidated.safetensors'], and neither model.safetensors nor"),
        (["pytorch_model.bin"], "only as ['pytorch_model.bin'], whose loading may run code. Expected *.safetensors"),
        (["model.ckpt"], "only as ['model.ckpt'], whose loading may run code"),
    ],
)
def test_weights_of_another_form_are_named(folder: Path, names: list[str], message: str) -> None:
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"weights")
    assert message in refusal(folder)


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_without_its_base_is_named(folder: Path, with_config: bool) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    if not with_config:
        (folder / "config.json").unlink()
    assert "an adapter (adapter_config.json) without its base model org/base. Merge the two" in refusal(folder)


def test_pickled_weights_are_accepted_when_that_was_asked_for(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "vlm.allow_pickle=true" in refusal(folder)
    assert "pytorch_model.bin" in identify(VlmConfig(path=str(folder), allow_pickle=True)).files


def test_pickled_shards_are_found_by_their_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    assert "lists ['pytorch_model-1.bin'], which are missing" in refusal(folder, allow_pickle=True)
    (folder / "pytorch_model-1.bin").write_bytes(b"\x80\x02 an old pickle")
    assert weight_files(folder, {}, allow_pickle=True) == [folder / "pytorch_model-1.bin"]


def test_safetensors_are_read_first_even_where_pickles_are_allowed(folder: Path) -> None:
    (folder / "pytorch_model.bin").touch()
    assert weight_files(folder, {}, allow_pickle=True) == [folder / "model.safetensors"]


def test_pickles_of_another_name_are_refused_even_where_pickles_are_allowed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.pt")
    assert "['weights.pt'], but of these transformers reads pytorch_model.bin alone" in refusal(
        folder, allow_pickle=True
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 the beginning of an archive"])
def test_a_cut_pickle_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert f"pytorch_model.bin is cut off ({len(content)} bytes)" in refusal(folder, allow_pickle=True)

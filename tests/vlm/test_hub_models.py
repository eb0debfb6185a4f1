"""Models of the hub, without a network: the cache answers, and what it lacks is said plainly."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.numpy import save_file

from pipeline.errors import RunFailed
from pipeline.vlm.identity import identify
from pipeline.vlm.options import VlmConfig

COMMIT = "4d7a" * 10


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one commit of org/model, as huggingface_hub lays it out; no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "models--org--model"
    snapshot = model / "snapshots" / COMMIT
    (model / "blobs").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True)
    (model / "blobs" / "c").write_text(json.dumps({"model_type": "llava", "torch_dtype": "bfloat16"}))
    (snapshot / "config.json").symlink_to("../../blobs/c")
    save_file({"a": np.zeros(3, np.float32)}, model / "blobs" / "w")
    (snapshot / "model.safetensors").symlink_to("../../blobs/w")
    return model


def found(**options: Any) -> Any:
    return identify(VlmConfig(path="org/model", **options))


def test_a_cached_model_is_known_by_its_commit_and_needs_no_network(cache: Path) -> None:
    identity = found()
    assert (identity.model_id, identity.revision, identity.dtype) == ("org/model", COMMIT, "bfloat16")
    assert identity.files == {}  # the commit says it all
    assert identity.settings == {"vlm.revision_found": COMMIT, "vlm.dtype": "bfloat16"}
    assert found(revision=COMMIT).revision == COMMIT


def test_a_revision_that_is_not_in_the_cache_is_named(cache: Path) -> None:
    with pytest.raises(RunFailed, match=r"org/model: .* not in the local cache at revision v2.*hf download org/model"):
        found(revision="v2")


def test_a_model_that_is_not_in_the_cache_is_named(cache: Path) -> None:
    with pytest.raises(RunFailed, match=r"org/other: not a folder here.*HF_HUB_OFFLINE"):
        identify(VlmConfig(path="org/other"))


def test_a_blob_that_was_deleted_is_noticed(cache: Path) -> None:
    (cache / "blobs" / "w").unlink()
    with pytest.raises(RunFailed, match=r"model\.safetensors is a link to \.\./\.\./blobs/w, which is not there"):
        found()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RevisionNotFoundError, r"vlm\.revision=v2: org/model has no such branch, tag or commit"),
        (RepositoryNotFoundError, "org/model: not a folder here, and the hub has no such model"),
        (GatedRepoError, "org/model asks for consent: accept its terms"),
        (PermissionError, "not to be had from the hub"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        if error is PermissionError:
            raise error("cache is not writable")
        raise error("404", response=httpx2.Response(404, request=httpx2.Request("GET", "https://hub")))  # type: ignore[call-arg]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(RunFailed, match=message):
        found(revision="v2")


@pytest.fixture
def downloads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What snapshot_download was asked for."""
    asked: list[SimpleNamespace] = []

    def download(path: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        asked.append(SimpleNamespace(path=path, revision=revision, ignored=ignore_patterns))
        return str(cache / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_pickles_are_not_downloaded(downloads: list[SimpleNamespace]) -> None:
    found()
    (asked,) = downloads
    assert {"*.bin", "*.pt", "*.gguf", "*.onnx"} <= set(asked.ignored)


def test_pickles_are_downloaded_where_they_are_allowed_and_alone(cache: Path, downloads: list[Any]) -> None:
    found(allow_pickle=True)
    assert len(downloads) == 1  # there are safetensors
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(RunFailed, match="no weights"):
        found(allow_pickle=True)
    assert "*.bin" not in downloads[-1].ignored
    assert "*.gguf" in downloads[-1].ignored

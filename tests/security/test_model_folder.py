"""Model folders of somebody else: what they name is not run, whatever file names it."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import modeling_utils
from transformers.integrations import hub_kernels

from pipeline.errors import RunFailed, UsageError, VlmBatchError
from pipeline.tensors.load import load_processor
from pipeline.vlm import identity as identity_module
from pipeline.vlm.identity import identify
from pipeline.vlm.load import check_model, load_model
from pipeline.vlm.options import VlmConfig

DEMO = Path(identity_module.__file__).with_name("demo")


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches of one's own, no network, and a package that would fetch attention kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def refused(*_: Any, **__: Any) -> Any:
        (tmp_path / "touched").write_text("a connection")
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refused)
    # As if the package `kernels` were installed, which fetches and runs what is named.
    for module in (hub_kernels, modeling_utils):
        monkeypatch.setattr(module, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", refused)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model, and beside it code that leaves a trace wherever it is run."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    code = f"open({str(tmp_path / 'touched')!r}, 'w')\nclass Evil:\n    from_pretrained = classmethod(print)\n"
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "generate = print\n")
    return folder


def changed(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def opened(folder: Path, **options: Any) -> VlmBatchError | None:
    """All that a run does with a folder before the first row; why it was refused."""
    config = VlmConfig(path=str(folder), device="cpu", **options)
    try:
        identity = identify(config)
        check_model(config, identity)
        load_processor(str(folder), {}, trust_remote_code=config.trust_remote_code)
        load_model(config, identity, num_threads=1)
    except VlmBatchError as problem:
        return problem
    return None


PARTS = "Config Model ModelForImageTextToText ModelForCausalLM Processor ImageProcessor VideoProcessor FeatureExtractor"
AUTO_MAP: dict[str, Any] = {f"Auto{part}": "evil.Evil" for part in PARTS.split()}
AUTO_MAP["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
     "video_preprocessor_config.json", "generation_config.json"],
)  # fmt: skip
@pytest.mark.parametrize("known", [True, False])
def test_code_that_a_folder_names_is_not_run(name: str, known: bool, folder: Path, tmp_path: Path) -> None:
    """Fault S-3: auto_map, and trust_remote_code as the folder says it, in each of a model's files: not obeyed."""
    kinds = {} if known else {"tokenizer_class": "Evil", "processor_class": "Evil", "image_processor_type": "Evil"}
    changed(folder, name, auto_map=AUTO_MAP, trust_remote_code=True, _auto_class="AutoModel", **kinds)
    problem = opened(folder)
    assert not (tmp_path / "touched").exists()
    assert not list((tmp_path / "modules").rglob("evil*"))
    assert problem is None or str(folder) in str(problem)


def test_a_model_of_code_alone_is_refused_with_the_way_to_trust_it(folder: Path, tmp_path: Path) -> None:
    """Fault S-3: a model that only its own code can load is refused, by the names of that code."""
    changed(folder, "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    problem = opened(folder)
    assert isinstance(problem, UsageError)
    assert "brings Python code of its own (evil.Evil)" in str(problem)
    assert "vlm.trust_remote_code=true" in str(problem)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("kernel", ["evil/kernel", "evil/kernel:forward", "paged|evil/kernel@main"])
def test_a_kernel_that_a_folder_names_is_not_fetched(key: str, kernel: str, folder: Path, tmp_path: Path) -> None:
    """Fault S-3: an attention kernel of a hub repository, which config.json names, is neither fetched nor run."""
    config = json.loads((folder / "config.json").read_text())
    parts = {part: config[part] | {key: kernel} for part in ("text_config", "vision_config")}
    changed(folder, "config.json", **{key: kernel}, **parts)
    problem = opened(folder)
    assert not (tmp_path / "touched").exists()
    if key == "_attn_implementation_internal":
        assert problem is None, "transformers takes it for no setting"
    else:
        assert isinstance(problem, UsageError)
        assert f"asks for the attention kernel '{kernel}'" in str(problem)


def test_code_that_would_generate_in_the_models_place_is_not_run(folder: Path, tmp_path: Path) -> None:
    """Fault S-3: custom_generate/ in the folder, named by its generation settings, is not run."""
    changed(folder, "generation_config.json", custom_generate=str(folder), trust_remote_code=True)
    config = VlmConfig(path=str(folder), device="cpu")
    with contextlib.suppress(RunFailed, ValueError):  # it may be refused, or left unread
        loaded = load_model(config, identify(config), num_threads=1)
        loaded.model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2)
    assert not (tmp_path / "touched").exists()


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin", "model.safetensors"])
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_pickle_in_a_model_folder_is_not_unpickled(
    name: str, allow_pickle: bool, folder: Path, tmp_path: Path
) -> None:
    """Fault S-3: weights that are a pickle with code in it: refused, and where pickles are allowed not executed."""
    if name != "training_args.bin":  # that one lies beside sound weights, and is nobody's business
        (folder / "model.safetensors").unlink()
    torch.save({"a": Canary(tmp_path / "touched")}, folder / name)
    problem = opened(folder, allow_pickle=allow_pickle)
    assert not (tmp_path / "touched").exists()
    assert (problem is None) == (name == "training_args.bin")
    if problem is not None:
        assert isinstance(problem, RunFailed)
        assert str(folder) in str(problem)
    if name == "pytorch_model.bin" and not allow_pickle:
        assert "vlm.allow_pickle=true" in str(problem)


def test_an_index_does_not_lead_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """Fault S-3: an index of weights that names a pickle elsewhere."""
    (folder / "model.safetensors").unlink()
    torch.save({"a": Canary(tmp_path / "touched")}, tmp_path / "evil.bin")
    changed(folder, "model.safetensors.index.json", weight_map={"a": "../evil.bin"})
    assert isinstance(opened(folder), RunFailed)
    assert not (tmp_path / "touched").exists()

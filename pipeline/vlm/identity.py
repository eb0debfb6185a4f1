"""Which model this is: its folder, its files' hashes, what its settings say. Reads files only, without torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.options import Dtype, VlmConfig

DEMO = "demo"
_DEMO_FOLDER = Path(__file__).parent / "demo"
_NOT_MODEL = (".md", ".gitattributes", ".lock", ".msgpack", ".h5", ".onnx", ".gguf")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A model on this machine. `files` goes into the fingerprint: name -> sha256, or nothing for a hub commit."""

    model_id: str
    revision: str | None  # hub commit
    folder: Path
    files: Mapping[str, str]
    dtype: str  # what the weights are computed in: vlm.dtype, and for auto what the checkpoint says
    config: Mapping[str, Any]  # config.json
    generation_config: Mapping[str, Any]  # generation_config.json

    @property
    def settings(self) -> dict[str, Any]:
        """What of the model changes answers, by dotted key."""
        found: dict[str, Any] = {f"vlm.files.{name}": digest for name, digest in self.files.items()}
        return found | {"vlm.revision_found": self.revision, "vlm.dtype": self.dtype}

    @property
    def max_tokens(self) -> int | None:
        """The context in tokens, prompt and answer together; None where the model does not say."""
        names = ("text_config", "llm_config", "language_config")
        text: Mapping[str, Any] = next((self.config[name] for name in names if name in self.config), {})
        found = text.get("max_position_embeddings", self.config.get("max_position_embeddings"))
        return int(found) if found else None


def identify(options: VlmConfig) -> ModelIdentity:
    """Find the model and hash its files (once per file: hashes are cached by path, size and time).

    Raises:
        RunFailed: there is no such model here, or its folder is not whole.
    """
    folder, revision = _folder(options)
    config = _json(folder / "config.json")
    if config is None:
        names = sorted(entry.name for entry in folder.iterdir())[:10]
        raise RunFailed(
            f"vlm.path={options.path}: {folder} has no config.json (it holds {names}). "
            "Expected a folder written by save_pretrained."
        )
    _check_whole(folder)
    files = {} if revision else dict(_hashes(folder))
    model_id = DEMO if options.path == DEMO else options.path
    dtype = options.dtype.value if options.dtype is not Dtype.auto else _checkpoint_dtype(config)
    return ModelIdentity(
        model_id, revision, folder, files, dtype, config, _json(folder / "generation_config.json") or {}
    )


def _folder(options: VlmConfig) -> tuple[Path, str | None]:
    if options.path == DEMO:
        return _DEMO_FOLDER, None
    path = Path(options.path).expanduser()
    if path.is_dir():
        return path.resolve(), None
    if path.exists() or options.path.startswith((".", "/", "~")) or options.path.count("/") > 1:
        raise UsageError(
            f"vlm.path={options.path}: no such folder. Expected a model folder or a hub name such as org/model."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(
            snapshot_download(
                options.path, revision=options.revision, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as problem:
        raise RunFailed(
            f"vlm.path={options.path}: not a folder here, and not to be had from the hub: {problem}"
        ) from problem
    return found, found.name


def _checkpoint_dtype(config: Mapping[str, Any]) -> str:
    found = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(found).removeprefix("torch.")


def _check_whole(folder: Path) -> None:
    """A half-downloaded model fails here, with the file's name, and not as random weights."""
    for index in folder.glob("*.safetensors.index.json"):
        listed = sorted(set((_json(index) or {}).get("weight_map", {}).values()))
        if missing := [name for name in listed if not (folder / name).is_file()]:
            raise RunFailed(f"{folder}: {index.name} lists {missing}, which are missing. Download the model again.")
    weights = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not weights:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        if pickled:
            raise RunFailed(
                f"{folder} has its weights only as {pickled}, whose loading may run code. Expected *.safetensors: "
                "convert the model (load it where you trust it, then save_pretrained)."
            )
        raise RunFailed(f"{folder} has no weights (*.safetensors). Download the model again.")
    for path in weights:
        _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    """Compare the file's size with what its header promises."""
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        header_bytes = int.from_bytes(head, "little")
        if len(head) < 8 or header_bytes > size_bytes - 8:
            raise RunFailed(f"{path} is cut off in its header ({size_bytes} bytes). Download it again.")
        try:
            header = json.loads(file.read(header_bytes))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, LookupError, AttributeError) as problem:
            raise RunFailed(f"{path} has a damaged header ({problem}). Download it again.") from problem
    end = max(ends, default=0)
    if size_bytes != 8 + header_bytes + end:
        raise RunFailed(
            f"{path} has {size_bytes} bytes, its header promises {8 + header_bytes + end}. Download it again."
        )


def _hashes(folder: Path) -> Iterator[tuple[str, str]]:
    cache_path = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vlm-batch" / "sha256.json"
    cache = _json(cache_path) or {}
    fresh = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.suffix in _NOT_MODEL:
            continue
        status = path.stat()
        key = f"{path}|{status.st_size}|{status.st_mtime_ns}"
        digest = cache.get(key)
        if digest is None:
            with open(path, "rb") as file:
                digest = fresh[key] = hashlib.file_digest(file, "sha256").hexdigest()
        yield path.name, digest
    if fresh:
        # Only a cache: where it cannot be written the next start hashes again.
        with contextlib.suppress(OSError):
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            beside = cache_path.with_suffix(f".{uuid.uuid4().hex}.tmp")
            beside.write_text(json.dumps(cache | fresh))
            os.replace(beside, cache_path)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {} if path.name == "sha256.json" else _damaged(path)
    return content if isinstance(content, dict) else {}


def _damaged(path: Path) -> dict[str, Any]:
    raise RunFailed(f"{path} cannot be read as JSON. Download the model again.")

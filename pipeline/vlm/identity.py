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
from pipeline.vlm.checkpoint import WEIGHT_SUFFIXES, check_downloaded, read_json, stored_dtype, weight_files
from pipeline.vlm.hub import snapshot
from pipeline.vlm.options import Dtype, Quantization, VlmConfig

DEMO = "demo"
_DEMO_FOLDER = Path(__file__).parent / "demo"
_NOT_MODEL = (".md", ".gitattributes", ".lock")
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "decoder", "thinker_config")
_EXTENDING_ROPE = ("linear", "dynamic", "yarn", "longrope", "su", "llama3")


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
        """The context in tokens, prompt and answer together; None where the model does not say.

        Never less than the model takes: what its positions allow, stretched by the factor of its rotary embedding, and
        twice over where prompt and answer have positions of their own (encoder-decoders).
        """
        text = _text_config(_text_config(self.config))  # twice: omni models have it two levels down
        positions = text.get("max_position_embeddings", self.config.get("max_position_embeddings"))
        if not isinstance(positions, int) or positions <= 0:
            return None
        tokens = max([positions, *(_stretched(positions, rope) for rope in _ropes(text))])
        both = any(config.get("is_encoder_decoder") for config in (self.config, text))
        return 2 * tokens if both else tokens


def identify(options: VlmConfig) -> ModelIdentity:
    """Find the model and hash its files (once per file: hashes are cached by path, size and time).

    Raises:
        UsageError: vlm.path names nothing, or vlm.quantization is set for weights that are quantized already.
        RunFailed: there is no such model here, or its folder is not whole.
    """
    folder, revision = _folder(options)
    check_downloaded(folder)
    config = _config(options, folder)
    weights = weight_files(folder, config, allow_pickle=options.allow_pickle)
    if (stored := stored_quantization(config)) and options.quantization is not Quantization.none:
        raise UsageError(
            f"vlm.quantization={options.quantization.value}: the weights in {folder} are quantized already "
            f"({stored} in config.json). Use vlm.quantization=none."
        )
    dtype = options.dtype.value if options.dtype is not Dtype.auto else _checkpoint_dtype(config, weights)
    return ModelIdentity(
        model_id=DEMO if options.path == DEMO else options.path,
        revision=revision,
        folder=folder,
        files={} if revision else dict(_hashes(folder, weights)),
        dtype=dtype,
        config=config,
        generation_config=read_json(folder / "generation_config.json") or {},
    )


def identify_processor(options: VlmConfig) -> ModelIdentity:
    """What is needed to render prompts: weights are not looked for, and not downloaded either.

    Raises:
        UsageError: vlm.path names nothing.
        RunFailed: there is no such model here.
    """
    folder, revision = _folder(options, with_weights=False)
    return ModelIdentity(
        model_id=DEMO if options.path == DEMO else options.path,
        revision=revision,
        folder=folder,
        files={},
        dtype=options.dtype.value,
        config=read_json(folder / "config.json") or {},
        generation_config={},
    )


def stored_quantization(config: Mapping[str, Any]) -> str | None:
    """How a checkpoint's weights are quantized in its files; None where they are not."""
    for part in (config, _text_config(config)):
        if isinstance(found := part.get("quantization_config"), dict):
            return str(found.get("quant_method", "quantization_config"))
    return None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that is about the language model; all of it where no part is."""
    return next((config[name] for name in _TEXT_CONFIGS if isinstance(config.get(name), dict)), config)


def _folder(options: VlmConfig, *, with_weights: bool = True) -> tuple[Path, str | None]:
    if options.path == DEMO:
        return _DEMO_FOLDER, None
    path = Path(options.path).expanduser()
    if path.is_dir():
        if options.revision is not None:
            raise UsageError(
                f"vlm.revision={options.revision}: {path} is a folder, which has no revisions; its files are known by "
                "their hashes. Leave vlm.revision out, or give a hub name as vlm.path."
            )
        return path.resolve(), None
    if path.exists() or options.path.startswith((".", "/", "~")) or options.path.count("/") > 1:
        raise UsageError(
            f"vlm.path={options.path}: no such folder. Expected a model folder or a hub name such as org/model."
        )
    return snapshot(options, with_weights=with_weights)


def _config(options: VlmConfig, folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if config is None and (folder / "adapter_config.json").is_file():
        weight_files(folder, {}, allow_pickle=False)  # says that an adapter is no model
    if config is None:
        names = sorted(entry.name for entry in folder.iterdir())[:10]
        raise RunFailed(
            f"vlm.path={options.path}: {folder} has no config.json (it holds {names}). "
            "Expected a folder written by save_pretrained."
        )
    if not config.get("model_type") and not config.get("auto_map"):
        raise RunFailed(
            f"vlm.path={options.path}: {folder / 'config.json'} has no model_type, which says what model it is. "
            "Expected a folder written by save_pretrained."
        )
    return config


def _checkpoint_dtype(config: Mapping[str, Any], weights: list[Path]) -> str:
    """What the configuration says, of the whole or of the language model, else what most of the weights are."""
    for part in (config, *(config.get(name) for name in _TEXT_CONFIGS)):
        if isinstance(part, dict):
            name = str(part.get("dtype") or part.get("torch_dtype")).removeprefix("torch.")
            if name in Dtype.__members__ and name != Dtype.auto.value:
                return name
    return stored_dtype(weights) or Dtype.float32.value


def _ropes(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The settings of the rotary embedding: one set, or one for each kind of layer."""
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := text.get(name), dict):
            yield rope
            yield from (each for each in rope.values() if isinstance(each, dict))


def _stretched(positions: int, rope: Mapping[str, Any]) -> int:
    """Positions that a rotary embedding reaches when it is stretched beyond those it was trained on."""
    factor, trained = rope.get("factor"), rope.get("original_max_position_embeddings")
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in _EXTENDING_ROPE or not isinstance(factor, (int, float)) or not factor > 1:
        return positions
    return max(positions, int(factor * (trained if isinstance(trained, int) else positions)))


def _hashes(folder: Path, weights: list[Path]) -> Iterator[tuple[str, str]]:
    """Name and sha256 of each file that the model, its tokenizer or its processor is made from."""
    cache_path = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vlm-batch" / "sha256.json"
    cache = _cached(cache_path)
    fresh = {}
    for path in sorted({*weights, *_small_files(folder)}):
        status = path.stat()
        key = f"{path}|{status.st_size}|{status.st_mtime_ns}"
        digest = cache.get(key)
        if digest is None:
            with open(path, "rb") as file:
                digest = fresh[key] = hashlib.file_digest(file, "sha256").hexdigest()
        yield path.relative_to(folder).as_posix(), digest
    if fresh:
        # Only a cache: where it cannot be written the next start hashes again.
        with contextlib.suppress(OSError):
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            beside = cache_path.with_suffix(f".{uuid.uuid4().hex}.tmp")
            beside.write_text(json.dumps(cache | fresh))
            os.replace(beside, cache_path)


def _small_files(folder: Path) -> Iterator[Path]:
    """Everything but weights, in the folder and in those of a processor's parts (additional_chat_templates/,
    qformer_tokenizer/). A folder with weights of its own is another model, or a checkpoint of training."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            inside = list(path.iterdir())
            if not any(each.suffix in WEIGHT_SUFFIXES for each in inside):
                yield from (each for each in inside if _is_small_file(each))
        elif _is_small_file(path):
            yield path


def _is_small_file(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return path.is_file() and not hidden and path.suffix not in (*WEIGHT_SUFFIXES, *_NOT_MODEL)


def _cached(path: Path) -> dict[str, str]:
    """Remembered hashes; none where the cache is damaged."""
    try:
        return read_json(path) or {}
    except RunFailed:
        return {}

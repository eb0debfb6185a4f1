"""Whether a model folder is whole, and which of its files are its weights. Reads headers only, without torch.

A half-downloaded model fails here, with the file's name, and not as random weights.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import RunFailed

# The names that transformers looks for, in its order. An index names the files of a sharded model.
_SAFE, _SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", *_PICKLE_SUFFIXES)

_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024  # a pointer of git-lfs is smaller than this
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file.

    Raises:
        RunFailed: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        raise RunFailed(f"{path} cannot be read as JSON ({problem}). Download the model again.") from problem
    if not isinstance(content, dict):
        raise RunFailed(
            f"{path} cannot be read as JSON with an object in it: it holds a {type(content).__name__}. "
            "Download the model again."
        )
    return content


def check_downloaded(folder: Path) -> None:
    """Refuse what a download or a clone left unfinished.

    Raises:
        RunFailed: a file is a pointer of git-lfs, a link into nothing, or a download that has not ended.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            raise RunFailed(
                f"{path} is a link to {path.readlink()}, which is not there: the download has not ended, or the cache "
                "was cleaned. Download the model again."
            )
        if path.is_file() and path.stat().st_size < _POINTER_BYTES and path.read_bytes().startswith(_POINTER):
            raise RunFailed(
                f"{path} is a pointer of git-lfs in place of the file itself. Run 'git lfs pull' in {folder}, or "
                "download the model again."
            )
    for place in (folder, folder / ".cache" / "huggingface" / "download"):  # the latter is hf download --local-dir's
        if unfinished := sorted(
            path for path in place.glob("**/*.incomplete") if place != folder or path.parent == folder
        ):
            raise RunFailed(
                f"{unfinished[0]}: this download has not ended. Let it end or start it again; where the model is "
                "whole nevertheless, delete that file."
            )


def weight_files(folder: Path, config: Mapping[str, Any], *, allow_pickle: bool) -> list[Path]:
    """The files that the weights are read from, each checked to be whole.

    Raises:
        RunFailed: there are none that may be read, one is missing, cut off, damaged, or not what the index says.
    """
    named = config.get("transformers_weights")
    for name in (str(named),) if named else (_SAFE, _SAFE_INDEX):
        if (folder / name).is_file():
            return _indexed(folder / name) if name.endswith(".json") else [_checked(folder / name)]
    if allow_pickle:
        for name in (_PICKLED, _PICKLED_INDEX):
            if (folder / name).is_file():
                return _indexed(folder / name) if name.endswith(".json") else [_checked(folder / name)]
    raise RunFailed(_no_weights(folder, allow_pickle))


def stored_dtype(files: list[Path]) -> str | None:
    """What most bytes of the weights are stored in; None where nothing can be said without unpickling."""
    num_bytes: Counter[str] = Counter()
    for path in files:
        if path.suffix == ".safetensors":
            for entry in _header(path).values():
                begin, end = entry["data_offsets"]
                if entry.get("dtype") in _DTYPES:
                    num_bytes[_DTYPES[entry["dtype"]]] += int(end) - int(begin)
    return num_bytes.most_common(1)[0][0] if num_bytes else None


def _indexed(index: Path) -> list[Path]:
    weight_map = (read_json(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RunFailed(f"{index} has no weight_map, which names the file of each weight. Download the model again.")
    names = sorted(set(map(str, weight_map.values())))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise RunFailed(f"{index.parent}: {index.name} lists {missing}, which are missing. Download the model again.")
    files = [_checked(index.parent / name) for name in names]
    for path in files:
        if path.suffix == ".safetensors":
            listed = {weight for weight, name in weight_map.items() if name == path.name}
            if absent := sorted(listed - set(_header(path))):
                raise RunFailed(
                    f"{path} lacks {len(absent)} weights that {index.name} says it has: {absent[:3]} ... The files are "
                    "of different versions; download the model again."
                )
    return files


def _checked(path: Path) -> Path:
    if path.suffix == ".safetensors":
        _header(path)
        return path
    with open(path, "rb") as file:
        head = file.read(2)
    if not head or (head == b"PK" and not zipfile.is_zipfile(path)):  # torch.save writes zip archives
        raise RunFailed(f"{path} is cut off ({path.stat().st_size} bytes). Download it again.")
    return path


def _header(path: Path) -> dict[str, Any]:
    """A safetensors file's weights: name -> dtype, shape, data_offsets. The size must fit these."""
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        header_bytes = int.from_bytes(head, "little")
        if len(head) < 8 or header_bytes > size_bytes - 8:
            raise RunFailed(f"{path} is cut off in its header ({size_bytes} bytes). Download it again.")
        try:
            header = json.loads(file.read(header_bytes))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        except (ValueError, TypeError, LookupError, AttributeError) as problem:
            raise RunFailed(f"{path} has a damaged header ({problem}). Download it again.") from problem
    if size_bytes != 8 + header_bytes + end:
        raise RunFailed(
            f"{path} has {size_bytes} bytes, its header promises {8 + header_bytes + end}. Download it again."
        )
    return entries


def _no_weights(folder: Path, allow_pickle: bool) -> str:
    """Why there is nothing to load, from what there is instead."""
    found = list(_instead(folder))
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickled and allow_pickle:
        found.append(f"{pickled}, but of these transformers reads {_PICKLED} alone")
    elif pickled:
        found.append(
            f"its weights only as {pickled}, whose loading may run code. Expected *.safetensors: convert the model "
            "(load it where you trust it, then save_pretrained), or set vlm.allow_pickle=true"
        )
    if not found:
        return (
            f"{folder} has no weights ({_SAFE} or {_SAFE_INDEX}). Download the model again; if its hub page has *.bin "
            "files alone, set vlm.allow_pickle=true."
        )
    return f"{folder} has {found[0]}."


def _instead(folder: Path) -> Iterator[str]:
    if (folder / "adapter_config.json").is_file():
        base = (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
        yield (
            f"an adapter (adapter_config.json) without its base model {base}. Merge the two with peft "
            "(merge_and_unload, then save_pretrained), and give the folder of the result"
        )
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        yield f"{others[:3]}, and neither {_SAFE} nor {_SAFE_INDEX}, which transformers reads. Download the model again"
    if gguf := sorted(path.name for path in folder.glob("*.gguf")):
        yield f"its weights only in GGUF ({gguf[0]}). Expected {_SAFE}: download the original model"
    if onnx := sorted(str(path.relative_to(folder)) for path in folder.glob("**/*.onnx")):
        yield f"its weights only in ONNX ({onnx[0]}). Expected {_SAFE}: download the original model"

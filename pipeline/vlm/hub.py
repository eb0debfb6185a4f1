"""A model of the hub: the folder of one commit in the local cache, downloaded where it is not there."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import RunFailed
from pipeline.vlm.options import VlmConfig

_PICKLED = ["*.bin", "*.pt", "*.pth", "*.ckpt"]
# Other forms of the same weights, many times the size of what is read.
_NEVER = ["*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.tflite", "onnx/*", "openvino/*", "original/*"]
_NEVER += ["consolidated*"]


def snapshot(options: VlmConfig, *, with_weights: bool = True) -> tuple[Path, str]:
    """Folder and commit of a hub model. Without a network (or with HF_HUB_OFFLINE=1) the cache alone answers.

    Raises:
        RunFailed: there is no such model or revision, or neither network nor cache has it.
    """
    if not with_weights:
        folder = _download(options, [*_NEVER, *_PICKLED, "*.safetensors"])
        return folder, folder.name
    folder = _download(options, [*_NEVER, *_PICKLED])
    if options.allow_pickle and not any(folder.glob("*.safetensors*")):
        folder = _download(options, _NEVER)
    return folder, folder.name


def _download(options: VlmConfig, ignore_patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    path, revision = options.path, options.revision
    try:
        return Path(snapshot_download(path, revision=revision, ignore_patterns=ignore_patterns))
    except RevisionNotFoundError as problem:
        raise RunFailed(
            f"vlm.revision={revision}: {path} has no such branch, tag or commit on the hub. See its page "
            f"https://huggingface.co/{path}/commits/main, or leave vlm.revision out."
        ) from problem
    except GatedRepoError as problem:
        raise RunFailed(
            f"vlm.path={path} asks for consent: accept its terms on https://huggingface.co/{path}, then run "
            "'hf auth login' or set HF_TOKEN."
        ) from problem
    except RepositoryNotFoundError as problem:
        raise RunFailed(
            f"vlm.path={path}: not a folder here, and the hub has no such model (a private one needs 'hf auth login')."
        ) from problem
    except LocalEntryNotFoundError as problem:
        at = f" at revision {revision}" if revision else ""
        raise RunFailed(
            f"vlm.path={path}: not a folder here, not to be had from the hub (no network, or HF_HUB_OFFLINE is set), "
            f"and not in the local cache{at}. Download it where there is a network: hf download {path}."
        ) from problem
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as problem:
        raise RunFailed(f"vlm.path={path}: not a folder here, and not to be had from the hub: {problem}") from problem

"""The model's processor from its folder, with the options of vlm.processor; what is missing or misspelt is named."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import RunFailed, UsageError

_PARTS = ("image_processor", "video_processor", "tokenizer")
_OF_LOADING = ("backend", "use_fast")  # arguments of from_pretrained itself


def load_processor(folder: str, options: Mapping[str, Any], *, trust_remote_code: bool) -> Any:
    """A transformers processor.

    Raises:
        RunFailed: the folder has none that can be loaded here.
        UsageError: an option that neither the processor nor a part of it knows; transformers would ignore it.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except ImportError as problem:
        raise RunFailed(missing_package(folder, problem)) from problem
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise RunFailed(f"the processor in {folder} cannot be loaded: {problem}") from problem
    _check_options(processor, options)
    return processor


def missing_package(folder: str, problem: ImportError) -> str:
    """What to install. transformers says "X requires the Torchvision library", or "`num2words` is required"."""
    said = " ".join(str(problem).split())
    found = re.search(r"requires the (\S+) library|[Pp]ackage `(\w+)`", said)
    package = problem.name or (found and (found[1] or found[2]).lower())
    install = f"Install it: pip install {package}." if package else "Install what it names."
    return f"the processor in {folder} needs a package that is not installed. {install} ({said.split('. ')[0]}.)"


def _check_options(processor: Any, options: Mapping[str, Any]) -> None:
    known = {*_OF_LOADING, *inspect.signature(type(processor).__init__).parameters}
    for name in _PARTS:
        part = getattr(processor, name, None)
        accepted = getattr(part, "valid_kwargs", None)
        if name == "image_processor" and accepted is None:
            return  # it comes with the model and does not say what it takes
        known |= {entry for base in getattr(accepted, "__mro__", ()) for entry in getattr(base, "__annotations__", ())}
        known |= {entry for entry in options if hasattr(part, entry)}
    for entry in options:
        if entry not in known:
            near = difflib.get_close_matches(entry, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"vlm.processor.{entry}: {type(processor).__name__} has no such option.{hint}")

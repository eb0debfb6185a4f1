"""The packages that the extra `score` brings, imported when a metric needs them."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from pipeline.errors import UsageError


@cache
def rapidfuzz_distance() -> Any:
    """Edit distances and longest common subsequences.

    Raises:
        UsageError: the package is not installed.
    """
    return _module("rapidfuzz.distance")


@cache
def tokenizer_13a() -> Any:
    """The tokenizer that BLEU is compared with everywhere: mteval-v13a.

    Raises:
        UsageError: the package is not installed.
    """
    return _module("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()


def forget_tokenized() -> None:
    """Empty the caches of sacrebleu's tokenizer: they hold 65,536 texts twice over, however long those are."""
    for module, name in (("tokenizer_13a", "Tokenizer13a"), ("tokenizer_re", "TokenizerRegexp")):
        tokenize = getattr(_module(f"sacrebleu.tokenizers.{module}"), name).__call__
        if clear := getattr(tokenize, "cache_clear", None):
            clear()


def _module(name: str) -> Any:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if (problem.name or "").partition(".")[0] != package:
            raise
        raise UsageError(
            f"this metric needs the package {package}, which is not installed: pip install 'vlm-batch[score]'"
        ) from problem

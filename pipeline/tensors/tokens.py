"""Which of a model's tokens mean something: those that stand for an image, those that no text of a row may hold."""

from __future__ import annotations

import re
from typing import Any


def closing_id(tokenizer: Any) -> int | None:
    """The token that ends every text of a tokenizer without an end-of-sequence token; None for all others."""
    return None if getattr(tokenizer, "eos_token_id", None) is not None else getattr(tokenizer, "sep_token_id", None)


def image_token_ids(processor: Any, tokenizer: Any) -> set[int]:
    """Tokens that may stand for a piece of an image; the commonest in a prompt does.

    Gemma's processor names the token before an image, and its tokenizer the one that the image's features replace.
    """
    named = (_image_token_id(processor, tokenizer), getattr(tokenizer, "image_token_id", None))
    return {int(number) for number in named if number is not None}


def _image_token_id(processor: Any, tokenizer: Any) -> int | None:
    if (number := getattr(processor, "image_token_id", None)) is not None:
        return int(number)
    token = getattr(processor, "image_token", None)
    if token is None:
        return None
    number = tokenizer.convert_tokens_to_ids(str(token))
    return None if number is None else int(number)


def special_pattern(processor: Any, tokenizer: Any) -> re.Pattern[str]:
    """Finds the model's own tokens in a text."""
    tokens = set(getattr(tokenizer, "all_special_tokens", []))
    tokens |= {str(token) for token in getattr(tokenizer, "added_tokens_encoder", {})}
    tokens |= {str(getattr(processor, name)) for name in ("image_token", "video_token") if hasattr(processor, name)}
    # Tokens such as "<s>" or "<|im_end|>"; a word that happens to be an added token is left alone.
    marked = sorted((t for t in tokens if len(t) > 2 and not t[0].isalnum() and not t.isspace()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, marked)) or r"(?!)")

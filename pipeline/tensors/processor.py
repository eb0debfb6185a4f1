"""One prompt through the model's own processor: chat template, tokens, image tensors. Runs in the worker processes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from pipeline.errors import RowFault, RunFailed
from pipeline.records import Stage

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Turn = Mapping[str, Any]

# What processors and chat templates were seen to raise on a row they do not like: an image of 1 x 5000 divides by zero,
# a template raises an error of its own where roles do not alternate.
_ROW_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TemplateError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class ProcessorSource:
    """Where the processor comes from; small enough to be sent to every worker."""

    folder: str
    options: Mapping[str, Any] = field(default_factory=dict)  # vlm.processor: max_pixels, do_image_splitting ...
    trust_remote_code: bool = False
    plain: bool = False  # prompt.format=plain: no chat template
    max_tokens: int | None = None  # the model's context, in tokens
    num_reserved_tokens: int = 1  # of the context, for the answer


@dataclass(frozen=True, slots=True)
class Encoded:
    """A processor's output for one prompt."""

    tensors: Mapping[str, np.ndarray[Any, Any]]  # input_ids [1, T] and whatever the model's forward takes
    num_prompt_tokens: int
    num_image_tokens: int | None
    warnings: tuple[str, ...]


class Processor:
    """A loaded processor.

    Raises:
        RunFailed: the folder has no processor that can be loaded here.
    """

    def __init__(self, source: ProcessorSource) -> None:
        from transformers import AutoProcessor

        try:
            self._processor = AutoProcessor.from_pretrained(
                source.folder, trust_remote_code=source.trust_remote_code, **source.options
            )
        except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError) as problem:
            raise RunFailed(f"the processor in {source.folder} cannot be loaded: {problem}") from problem
        self._source = source
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        if not source.plain and not getattr(self._processor, "chat_template", None):
            raise RunFailed(f"{source.folder} has no chat template. Set prompt.format=plain for models without one.")
        self._image_token_id = _image_token_id(self._processor, self._tokenizer)
        self._special = _special_pattern(self._processor, self._tokenizer)

    def encode(self, messages: Sequence[Turn], images: Sequence[Image.Image]) -> Encoded:
        """Tokens and image tensors of one conversation; the n-th image part is `images[n]`.

        Raises:
            RowFault: the prompt is longer than the model's context, or the processor refuses the row.
        """
        warnings: list[str] = []
        try:
            text = self.text(messages, warnings)
            batch = self._call(text, images)
        except _ROW_ERRORS as problem:
            raise RowFault(Stage.ENCODE, type(problem).__name__, str(problem) or "no message") from problem
        tensors = {name: tensor.numpy() for name, tensor in batch.items() if hasattr(tensor, "numpy")}
        input_ids = tensors["input_ids"]
        num_tokens = int(input_ids.shape[-1])
        self._check_length(num_tokens)
        num_image_tokens = None if self._image_token_id is None else int((input_ids == self._image_token_id).sum())
        if images and num_image_tokens is not None and num_image_tokens < len(images):
            raise RowFault(
                Stage.ENCODE,
                "ImageTokens",
                f"{len(images)} images, but only {num_image_tokens} image tokens in the prompt: the model would not "
                "see them all. The chat template drops images.",
            )
        return Encoded(tensors, num_tokens, num_image_tokens, tuple(warnings))

    def text(self, messages: Sequence[Turn], warnings: list[str]) -> str:
        """The prompt as the model's chat template renders it, generation prompt at the end."""
        if self._source.plain:
            return "".join(part["text"] for turn in messages for part in turn["content"] if part["type"] == "text")
        cleaned = [self._cleaned(turn, warnings) for turn in messages]
        rendered = self._processor.apply_chat_template(cleaned, add_generation_prompt=True, tokenize=False)
        return str(rendered)

    def _cleaned(self, turn: Turn, warnings: list[str]) -> dict[str, Any]:
        """Text in which no token of the model's own can be forged: a caption that says <image> is only a caption."""
        content = []
        for part in turn["content"]:
            if part["type"] == "text" and (found := self._special.findall(part["text"])):
                part = part | {"text": self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", part["text"])}
                warnings.append(f"text cleaned: {sorted(set(found))} are tokens of the model")
            content.append(dict(part))
        return dict(turn) | {"content": content}

    def _call(self, text: str, images: Sequence[Image.Image]) -> Mapping[str, Any]:
        arguments: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
        if images:
            arguments["images"] = [list(images)]
        bos = getattr(self._tokenizer, "bos_token", None)
        if bos and text.startswith(bos):
            arguments["add_special_tokens"] = False  # the template wrote it: a second one changes answers
        result: Mapping[str, Any] = self._processor(**arguments)
        return result

    def _check_length(self, num_tokens: int) -> None:
        limit = self._source.max_tokens
        if limit is not None and num_tokens + self._source.num_reserved_tokens > limit:
            raise RowFault(
                Stage.ENCODE,
                "PromptTooLong",
                f"the prompt has {num_tokens} tokens; the model takes {limit}, of which the answer needs at least "
                f"{self._source.num_reserved_tokens}.",
            )


def _image_token_id(processor: Any, tokenizer: Any) -> int | None:
    if (number := getattr(processor, "image_token_id", None)) is not None:
        return int(number)
    token = getattr(processor, "image_token", None)
    if token is None:
        return None
    number = tokenizer.convert_tokens_to_ids(str(token))
    return None if number is None else int(number)


def _special_pattern(processor: Any, tokenizer: Any) -> re.Pattern[str]:
    tokens = set(getattr(tokenizer, "all_special_tokens", []))
    tokens |= {str(token) for token in getattr(tokenizer, "added_tokens_encoder", {})}
    tokens |= {str(getattr(processor, name)) for name in ("image_token", "video_token") if hasattr(processor, name)}
    # Tokens such as "<s>" or "<|im_end|>"; a word that happens to be an added token is left alone.
    marked = sorted((t for t in tokens if len(t) > 2 and not t[0].isalnum() and not t.isspace()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, marked)) or r"(?!)")

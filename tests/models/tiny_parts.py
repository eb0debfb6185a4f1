"""What the tiny models are put together from: sizes, a tokenizer of single bytes, chat templates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers import processors as post_processors
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

Array = np.ndarray[Any, Any]

PAD, BOS, EOS = 0, 1, 2
NUM_TOKENS = 320  # rows of the embedding: 259 bytes and marks, and what a family adds

TEXT: dict[str, Any] = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
SQUARE = {"height": 28, "width": 28}


@dataclass(frozen=True)
class Built:
    """A model in memory with the processor that belongs to it; None where its class cannot be imported here."""

    processor: Any
    tokenizer: Any
    model: Any


@dataclass(frozen=True)
class HandMade:
    """An image as the processor would give it: its tokens in the prompt, its tensors."""

    tokens: list[int]
    tensors: dict[str, Array]


@dataclass(frozen=True)
class Architecture:
    """How a family is built, and how it is asked."""

    build: Callable[[], Built]
    plain: str | None = None  # the family's prompt form where it has no chat template; {question} stands for the text
    packages: tuple[str, ...] = ()  # what its processor needs beside transformers and Pillow
    by_hand: Callable[[Any, np.random.Generator, int], HandMade] | None = None  # an image where the class is missing


class _NoVideo(BaseVideoProcessor):  # type: ignore[misc]
    """Stands where torchvision is missing: images never ask it."""

    num_frames, fps, size = 1, 1, SQUARE  # read by chat templates' callers

    def __init__(self) -> None:
        pass

    def to_dict(self) -> dict[str, Any]:
        return {"video_processor_type": "BaseVideoProcessor"}


@contextmanager
def without_video() -> Iterator[None]:
    """Processor classes with a video half can be built in memory although torchvision is missing."""
    if is_torchvision_available():
        yield
        return
    check = ProcessorMixin.check_argument_for_proper_class

    def lenient(self: Any, name: str, argument: Any) -> Any:
        return type(argument) if isinstance(argument, _NoVideo) else check(self, name, argument)

    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", lenient):
        yield


def video_processor(name: str) -> Any:
    return getattr(transformers, name)() if is_torchvision_available() else _NoVideo()


def tokenizer_with(
    *special: str, named: Mapping[str, str] | None = None, adds_bos: bool = False, adds_eos: bool = False
) -> PreTrainedTokenizerFast:
    """One token for each byte. `named` are special tokens that the processor asks for as attributes."""
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if adds_bos or adds_eos:
        single = ("<s> " if adds_bos else "") + "$A" + (" </s>" if adds_eos else "")
        inner.post_processor = post_processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens=dict(named or {}),
        model_input_names=["input_ids", "attention_mask"],
    )
    found.add_special_tokens(
        {"additional_special_tokens": [*special, *(named or {}).values()]}, replace_extra_special_tokens=False
    )
    return found


def chat_template(start: str, image: str, end: str, generation: str, *, roles: Mapping[str, str] | None = None) -> str:
    """A chat template of the usual form; `ROLE` in start and generation is the role's name."""
    role = "m.role" if roles is None else f"{dict(roles)}[m.role]"
    opening = start.replace("ROLE", "{{ " + role + " }}")
    return (
        "{% for m in messages %}" + opening + "{% for part in m.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}"
        + end
        + "{% endfor %}"
        + ("{% if add_generation_prompt %}" + generation + "{% endif %}") * bool(generation)
    )


def chatml(image: str) -> str:
    return chat_template("<|im_start|>ROLE\n", image, "<|im_end|>\n", "<|im_start|>assistant\n")


ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}

"""Processors built in memory: a tokenizer of single bytes, and the image processors of real models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

IDEFICS_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
STRICT_TEMPLATE = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    + IDEFICS_TEMPLATE
)
BLIND_TEMPLATE = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"


def tokenizer(special: Iterable[str] = (), *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte; <s> in front where asked for, as Llama's tokenizer does."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=list(special),
    )


def save_idefics3(folder: Path, template: str | None = IDEFICS_TEMPLATE, *, adds_bos: bool = False) -> Path:
    """Images of 32 x 32 pixels, uncut: 4 image tokens each."""
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    side = {"longest_edge": 32}
    images = transformers.Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    return _save(
        transformers.Idefics3Processor(
            images, tokenizer(special, adds_bos=adds_bos), image_seq_len=4, chat_template=template
        ),
        folder,
    )


def save_idefics2(folder: Path) -> Path:
    """4 image tokens between two others for each image."""
    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>"]
    images = transformers.Idefics2ImageProcessorPil(size={"longest_edge": 56, "shortest_edge": 28})
    return _save(
        transformers.Idefics2Processor(images, tokenizer(special), image_seq_len=4, chat_template=IDEFICS_TEMPLATE),
        folder,
    )


def save_llava(folder: Path, template: str = IDEFICS_TEMPLATE) -> Path:
    """16 image tokens for each image."""
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return _save(
        transformers.LlavaProcessor(
            images,
            tokenizer(["<image>", "<end_of_utterance>"]),
            patch_size=7,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        ),
        folder,
    )


def _save(processor: Any, folder: Path) -> Path:
    processor.save_pretrained(folder)
    return folder

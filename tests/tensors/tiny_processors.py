"""Processors built in memory: a tokenizer of single bytes, and the image processors of real models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SIDE_28 = {"height": 28, "width": 28}
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


def tokenizer(
    special: Iterable[str] = (), *, named: Mapping[str, str] | None = None, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token for each byte; <s> in front where asked for, as Llama's tokenizer does.

    named: special tokens that a processor asks the tokenizer for by name.
    """
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    inner = _byte_tokenizer(vocabulary)
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens=dict(named) if named else list(special),
    )
    if named:
        found.add_special_tokens({"additional_special_tokens": [*special, *named.values()]})
    return found


def _byte_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


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


def save_llava(
    folder: Path, template: str | None = IDEFICS_TEMPLATE, *, image_token: str = "<image>", bos: str = "<s>"
) -> Path:
    """16 image tokens for each image."""
    text = tokenizer([image_token, "<end_of_utterance>"], adds_bos=bos == "<s>")
    text.add_special_tokens({"bos_token": bos})
    return _save(
        transformers.LlavaProcessor(
            clip_images(),
            text,
            patch_size=7,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token=image_token,
            chat_template=template,
        ),
        folder,
    )


def save_gemma3(folder: Path, template: str) -> Path:
    """4 image tokens between two others for each <start_of_image>."""
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    images = transformers.Gemma3ImageProcessorPil(size=SIDE_28)
    text = tokenizer(["<start_of_turn>", "<end_of_turn>"], named=named, adds_bos=True)
    return _save(transformers.Gemma3Processor(images, text, chat_template=template, image_seq_length=4), folder)


def save_mllama(folder: Path, template: str) -> Path:
    """One image token for each image: the model looks at images in layers of their own."""
    images = transformers.MllamaImageProcessorPil(size=SIDE_28, max_image_tiles=4)
    tokens = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"]
    return _save(transformers.MllamaProcessor(images, tokenizer(tokens, adds_bos=True), chat_template=template), folder)


def save_blip2(folder: Path, template: str | None = None) -> Path:
    """4 image tokens before the text, put there by the processor."""
    images = transformers.BlipImageProcessorPil(size=SIDE_28)
    processor = transformers.Blip2Processor(images, tokenizer(["<image>"], adds_bos=True), num_query_tokens=4)
    processor.chat_template = template
    return _save(processor, folder)


def save_paligemma(folder: Path) -> Path:
    """4 image tokens for each <image>, or before the text where it has none."""
    images = transformers.SiglipImageProcessorPil(size=SIDE_28)
    images.image_seq_length = 4
    return _save(transformers.PaliGemmaProcessor(images, tokenizer(["<image>"], adds_bos=True)), folder)


def save_florence2(folder: Path) -> Path:
    """5 image tokens before the text; <OD> and the like become a sentence."""
    images = transformers.CLIPImageProcessorPil(size=SIDE_28, crop_size=SIDE_28, do_center_crop=False)
    images.image_seq_length = 5
    return _save(transformers.Florence2Processor(images, tokenizer(named={"image_token": "<image>"})), folder)


def save_kosmos2(folder: Path) -> Path:
    """64 places for the image before the text; the processor has tokens for grounding, and none called image_token."""
    processor = transformers.Kosmos2Processor(clip_images(), tokenizer(), num_patch_index_tokens=4)
    return _save(processor, folder)


def save_git(folder: Path) -> Path:
    """No image token at all, and BERT's way with texts: [CLS] before, [SEP] after, no end of sequence."""
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    inner = _byte_tokenizer(vocabulary)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    text = PreTrainedTokenizerFast(tokenizer_object=inner, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    return _save(transformers.GitProcessor(clip_images(), text), folder)


def clip_images() -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIDE_28)


def _save(processor: Any, folder: Path) -> Path:
    processor.save_pretrained(folder)
    return folder

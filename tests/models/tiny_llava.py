"""Idefics and LLaVA in their generations."""

from __future__ import annotations

from typing import Any
from unittest import mock

import transformers
from tiny_parts import (
    PAD,
    ROLES,
    SIGLIP,
    SQUARE,
    TEXT,
    VISION,
    Built,
    chat_template,
    chatml,
    tokenizer_with,
    video_processor,
)

_LLAVA = chat_template(
    "ROLE: ", "<image>\n", " ", "ASSISTANT:", roles={"system": "SYSTEM", "user": "USER", "assistant": "ASSISTANT"}
)
_IDEFICS = chat_template("ROLE:", "<image>", "<end_of_utterance>\n", "Assistant:", roles=ROLES)


def idefics2() -> Built:
    images = transformers.Idefics2ImageProcessorPil(size={"longest_edge": 56, "shortest_edge": 28})
    processor = transformers.Idefics2Processor(
        images,
        tokenizer_with("<image>", "<fake_token_around_image>", "<end_of_utterance>"),
        image_seq_len=4,
        chat_template=_IDEFICS,
    )
    perceiver = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4}
    settings = transformers.Idefics2Config(
        vision_config=VISION | {"image_size": 56},
        perceiver_config=perceiver | {"num_key_value_heads": 2, "resampler_head_dim": 8},
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )
    return Built(processor, processor.tokenizer, transformers.Idefics2ForConditionalGeneration(settings))


def idefics3() -> Built:
    return _tiled("Idefics3")


def smolvlm() -> Built:
    return _tiled("SmolVLM", video_processor("SmolVLMVideoProcessor"))


def _tiled(family: str, *video: Any) -> Built:
    """Images cut into tiles of 56 x 56 pixels beside a small one of the whole: 4 image tokens each."""
    images = getattr(transformers, f"{family}ImageProcessorPil")(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}
    )
    tokens = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer = tokenizer_with(*tokens)
    named = {"fake_image_token": tokens[1], "image_token": tokens[0], "global_image_token": tokens[2]}
    if video:
        named["end_of_utterance_token"] = tokens[3]
    tokenizer = tokenizer_with(*tokens, named=named)
    with mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", str):  # for videos alone
        processor = getattr(transformers, f"{family}Processor")(
            images, tokenizer, *video, image_seq_len=4, chat_template=_IDEFICS
        )
    settings = getattr(transformers, f"{family}Config")(
        vision_config=VISION | {"image_size": 56},
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return Built(processor, processor.tokenizer, getattr(transformers, f"{family}ForConditionalGeneration")(settings))


# LLaVA ----------------------------------------------------------------------------


def llava() -> Built:
    processor = _llava_processor()
    settings = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=processor.image_token_id,
        image_seq_length=4,
    )
    return Built(processor, processor.tokenizer, transformers.LlavaForConditionalGeneration(settings))


def vipllava() -> Built:
    processor = _llava_processor()
    settings = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=processor.image_token_id,
        image_seq_length=4,
        vision_feature_layers=[0, 0, 1, 1, 0],
    )
    return Built(processor, processor.tokenizer, transformers.VipLlavaForConditionalGeneration(settings))


def _llava_processor() -> Any:
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE),
        tokenizer_with("<image>", adds_bos=True),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA,
    )


_PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84]]


def llava_next() -> Built:
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=_PINPOINTS
    )
    processor = transformers.LlavaNextProcessor(
        images,
        tokenizer_with("<image>", adds_bos=True),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("[INST] ", "<image>\n", " [/INST]", ""),
    )
    settings = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=_PINPOINTS,
    )
    return Built(processor, processor.tokenizer, transformers.LlavaNextForConditionalGeneration(settings))


def llava_onevision() -> Built:
    images = transformers.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=_PINPOINTS)
    processor = transformers.LlavaOnevisionProcessor(
        images,
        tokenizer_with("<|im_start|>", "<|im_end|>", "<image>", "<video>"),
        video_processor("LlavaOnevisionVideoProcessor"),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>\n"),
    )
    settings = transformers.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return Built(processor, processor.tokenizer, transformers.LlavaOnevisionForConditionalGeneration(settings))

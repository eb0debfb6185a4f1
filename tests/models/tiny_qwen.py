"""Qwen and GLM: images of any size as lists of patches, positions in three dimensions."""

from __future__ import annotations

from typing import Any

import transformers
from tiny_parts import TEXT, Built, chat_template, chatml, tokenizer_with, video_processor


def _qwen(family: str, processor_family: str, text: dict[str, Any], video: str, **vision: Any) -> Built:
    patch_size = vision.get("patch_size", 14)
    side = 2 * patch_size
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch_size, size={"shortest_edge": side * side, "longest_edge": 6 * side * side}
    )
    tokens = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
    processor = getattr(transformers, f"{processor_family}Processor")(
        images,
        tokenizer_with(*tokens),
        video_processor(video),
        chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    number = processor.tokenizer.convert_tokens_to_ids
    settings = getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config={"hidden_size": 32, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2}
        | {"temporal_patch_size": 2, "in_channels": 3}
        | vision,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return Built(processor, processor.tokenizer, getattr(transformers, f"{family}ForConditionalGeneration")(settings))


def _mrope(section: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 10_000.0} | more}


def qwen2_vl() -> Built:
    text = TEXT | _mrope([1, 1, 2])
    return _qwen("Qwen2VL", "Qwen2VL", text, "Qwen2VLVideoProcessor", depth=2, embed_dim=32, mlp_ratio=2)


def qwen2_5_vl() -> Built:
    vision = {"depth": 2, "out_hidden_size": 32, "intermediate_size": 64, "window_size": 56}
    text = TEXT | _mrope([1, 1, 2])
    return _qwen("Qwen2_5_VL", "Qwen2_5_VL", text, "Qwen2VLVideoProcessor", **vision, fullatt_block_indexes=[1])


_QWEN3_VISION = {"depth": 3, "out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 16}


def qwen3_vl() -> Built:
    text = TEXT | {"head_dim": 8} | _mrope([2, 1, 1], mrope_interleaved=True)
    vision = _QWEN3_VISION | {"patch_size": 16, "deepstack_visual_indexes": [0, 1]}
    return _qwen("Qwen3VL", "Qwen3VL", text, "Qwen3VLVideoProcessor", **vision)


def qwen3_5() -> Built:
    """Every second layer keeps a state instead of keys and values: padding has to leave no trace in it."""
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    text = TEXT | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]} | linear
    text |= _mrope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=1.0)
    return _qwen("Qwen3_5", "Qwen3VL", text, "Qwen3VLVideoProcessor", **_QWEN3_VISION | {"patch_size": 16})


def glm4v() -> Built:
    images = transformers.Glm4vImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 12 * 28 * 28})
    marks = ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
    tokens = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|image|>", "<|video|>", *marks]
    template = chat_template("<|ROLE|>\n", "<|begin_of_image|><|image|><|end_of_image|>", "", "<|assistant|>\n")
    processor = transformers.Glm4vProcessor(
        images,
        tokenizer_with(*tokens),
        video_processor("Glm4vVideoProcessor"),
        chat_template="[gMASK]<sop>\n" + template,
    )
    number = processor.tokenizer.convert_tokens_to_ids
    settings = transformers.Glm4vConfig(
        text_config=TEXT | _mrope([1, 1, 2], partial_rotary_factor=1.0),
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32, "intermediate_size": 64}
        | {"image_size": 56, "patch_size": 14},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        image_start_token_id=number("<|begin_of_image|>"),
        image_end_token_id=number("<|end_of_image|>"),
        video_start_token_id=number("<|begin_of_video|>"),
        video_end_token_id=number("<|end_of_video|>"),
    )
    return Built(processor, processor.tokenizer, transformers.Glm4vForConditionalGeneration(settings))

"""Further families that write a placeholder for each image into the prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from tiny_parts import (
    NUM_TOKENS,
    ROLES,
    SIGLIP,
    SQUARE,
    TEXT,
    VISION,
    Array,
    Built,
    HandMade,
    chat_template,
    chatml,
    tokenizer_with,
    video_processor,
)
from transformers.utils import is_torchvision_available


def deepseek_vl() -> Built:
    processor = transformers.DeepseekVLProcessor(
        transformers.DeepseekVLImageProcessorPil(size=SQUARE),
        tokenizer_with(named={"image_token": "<image_placeholder>"}),
        chat_template=chat_template("ROLE: ", "<image_placeholder>", "\n\n", "Assistant:", roles=ROLES),
        num_image_tokens=4,
    )
    settings = transformers.DeepseekVLConfig(
        vision_config=SIGLIP,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )
    return Built(processor, processor.tokenizer, transformers.DeepseekVLForConditionalGeneration(settings))


def ovis2() -> Built:
    images = transformers.Ovis2ImageProcessorPil(
        size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4, use_covering_area_grid=True
    )
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    processor = transformers.Ovis2Processor(
        images,
        tokenizer_with("<|im_start|>", "<|im_end|>", "<image>", "<IMG_ATOM>", *marks),
        chat_template=chatml("<image>\n"),
        image_seq_length=4,
    )
    number = processor.tokenizer.convert_tokens_to_ids
    vision = VISION | {"vocab_size": 64, "hidden_stride": 1, "num_visual_indicator_tokens": 5}
    settings = transformers.Ovis2Config(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=number("<IMG_ATOM>"),
        visual_indicator_token_ids=number(marks),
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return Built(processor, processor.tokenizer, transformers.Ovis2ForConditionalGeneration(settings))


def internvl() -> Built:
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    processor = transformers.InternVLProcessor(
        images,
        tokenizer_with("<|im_start|>", "<|im_end|>", named=named),
        video_processor("InternVLVideoProcessor"),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )
    vision = {key: value for key, value in VISION.items() if key not in ("image_size", "patch_size")}
    settings = transformers.InternVLConfig(
        vision_config=vision | {"image_size": [56, 56], "patch_size": [14, 14]},
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return Built(processor, processor.tokenizer, transformers.InternVLForConditionalGeneration(settings))


_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = chat_template(
    "<start_of_turn>ROLE\n",
    "<start_of_image>",
    "<end_of_turn>\n",
    "<start_of_turn>model\n",
    roles={"system": "user", "user": "user", "assistant": "model"},
)


def gemma3() -> Built:
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil(size=SQUARE),
        tokenizer_with("<start_of_turn>", "<end_of_turn>", named=named, adds_bos=True),
        chat_template="{{ bos_token }}" + _GEMMA,
        image_seq_length=4,
    )
    number = processor.tokenizer.convert_tokens_to_ids
    settings = transformers.Gemma3Config(
        vision_config=SIGLIP,
        text_config=TEXT | {"head_dim": 8} | _SLIDING,
        image_token_index=number("<image_soft_token>"),
        image_token_id=number("<image_soft_token>"),
        mm_tokens_per_image=4,
        boi_token_index=number("<start_of_image>"),
        eoi_token_index=number("<end_of_image>"),
    )
    return Built(processor, processor.tokenizer, transformers.Gemma3ForConditionalGeneration(settings))


def paligemma() -> Built:
    images = transformers.SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(images, tokenizer_with("<image>", adds_bos=True))
    num_tokens = len(processor.tokenizer)  # with the places and segments that the processor adds
    settings = transformers.PaliGemmaConfig(
        vision_config=SIGLIP | {"projection_dim": 32},
        text_config=TEXT | {"model_type": "gemma", "head_dim": 8, "vocab_size": num_tokens},
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return Built(processor, processor.tokenizer, transformers.PaliGemmaForConditionalGeneration(settings))


def mistral3() -> Built:
    tokenizer = tokenizer_with("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]")
    processor = None
    if is_torchvision_available():
        processor = transformers.PixtralProcessor(
            transformers.PixtralImageProcessorPil(size={"longest_edge": 84}, patch_size={"height": 28, "width": 28}),
            tokenizer,
            patch_size=14,
            spatial_merge_size=2,
            chat_template="{{ bos_token }}" + chat_template("[INST]", "[IMG]", "[/INST]", ""),
        )
    settings = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**VISION | {"image_size": 84}),
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None, head_dim=8),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return Built(processor, tokenizer, transformers.Mistral3ForConditionalGeneration(settings))


def mistral3_image(tokenizer: Any, random: np.random.Generator, number: int) -> HandMade:
    """Rows of [IMG] tokens, one for each 28 x 28 pixels, with a mark at the end of each."""
    height, width = ((2, 2), (1, 3), (3, 1), (3, 2))[number % 4]
    image, line, end = tokenizer.convert_tokens_to_ids(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    tokens = ([image] * width + [line]) * height
    pixels = random.standard_normal((1, 3, 28 * height, 28 * width), dtype=np.float32)
    sizes = np.asarray([[28 * height, 28 * width]])
    return HandMade([*tokens[:-1], end], {"pixel_values": pixels, "image_sizes": sizes})


def aya_vision() -> Built:
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    tokens = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    turns = ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"]
    processor = transformers.AyaVisionProcessor(
        images,
        tokenizer_with(*tokens, *turns, "<|SYSTEM_TOKEN|>", "TILE", "TILE_GLOBAL", adds_bos=True),
        patch_size=14,
        img_size=56,
        downsample_factor=2,
        chat_template="{{ bos_token }}"
        + chat_template(
            "<|START_OF_TURN_TOKEN|>ROLE",
            "<image>",
            "<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            roles={"system": "<|SYSTEM_TOKEN|>", "user": "<|USER_TOKEN|>", "assistant": "<|CHATBOT_TOKEN|>"},
        ),
    )
    settings = transformers.AyaVisionConfig(
        vision_config=SIGLIP | {"image_size": 56},
        text_config=transformers.Cohere2Config(**TEXT | _SLIDING),
        image_token_index=processor.image_token_id,
        downsample_factor=2,
    )
    return Built(processor, processor.tokenizer, transformers.AyaVisionForConditionalGeneration(settings))


def got_ocr2() -> Built:
    images = transformers.GotOcr2ImageProcessorPil(size={"height": 256, "width": 256})
    tokens = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    processor = transformers.GotOcr2Processor(
        images, tokenizer_with(*tokens), chat_template=chatml("<img><imgpad></img>\n")
    )
    vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = transformers.GotOcr2Config(
        vision_config=vision
        | {"image_size": 256, "patch_size": 4, "mlp_dim": 64, "window_size": 4, "global_attn_indexes": []},
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_index=processor.image_token_id,
        image_seq_length=256,  # the processor writes as many, and a folder cannot say otherwise
    )
    return Built(processor, processor.tokenizer, transformers.GotOcr2ForConditionalGeneration(settings))


def mllama() -> Built:
    images = transformers.MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4)
    tokens = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"]
    processor = transformers.MllamaProcessor(
        images,
        tokenizer_with(*tokens, adds_bos=True),
        chat_template="{{ bos_token }}"
        + chat_template(
            "<|start_header_id|>ROLE<|end_header_id|>\n\n",
            "<|image|>",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 96,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }
    text = {key: value for key, value in TEXT.items() if key != "num_hidden_layers"}
    settings = transformers.MllamaConfig(
        vision_config=vision,
        text_config=text
        | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        image_token_index=processor.image_token_id,
    )
    return Built(processor, processor.tokenizer, transformers.MllamaForConditionalGeneration(settings))


def lfm2_vl() -> Built:
    tokens = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizer_with(*tokens, "<|startoftext|>")
    processor = None
    if is_torchvision_available():
        images = transformers.Lfm2VlImageProcessor(
            encoder_patch_size=14,
            tile_size=56,
            max_tiles=4,
            min_image_tokens=2,
            max_image_tokens=4,
            max_num_patches=16,
            downsample_factor=2,
        )
        template = "{{ bos_token }}" + chatml("<image>")
        processor = transformers.Lfm2VlProcessor(images, tokenizer, chat_template=template)
    vision = {key: value for key, value in VISION.items() if key != "image_size"}
    settings = transformers.Lfm2VlConfig(
        vision_config=vision | {"num_patches": 16},
        text_config=transformers.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"], conv_L_cache=3),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        downsample_factor=2,
        projector_hidden_size=32,
    )
    return Built(processor, tokenizer, transformers.Lfm2VlForConditionalGeneration(settings))


def lfm2_vl_image(tokenizer: Any, random: np.random.Generator, number: int) -> HandMade:
    """Up to 16 patches of 14 x 14 pixels, the rest of them padding; four become one token."""
    height, width = ((4, 4), (2, 4), (4, 2), (2, 6))[number % 4]
    num_patches = height * width
    start, image, end = tokenizer.convert_tokens_to_ids(["<|image_start|>", "<image>", "<|image_end|>"])
    pixels = np.zeros((1, 16, 588), np.float32)
    pixels[:, :num_patches] = random.standard_normal((num_patches, 588), dtype=np.float32)
    mask = (np.arange(16) < num_patches).astype(np.int64)[None]
    tensors: dict[str, Array] = {
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
        "spatial_shapes": np.asarray([[height, width]]),
    }
    return HandMade([start, *[image] * (num_patches // 4), end], tensors)

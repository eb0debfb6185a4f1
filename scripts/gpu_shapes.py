"""Three published models as the GPU benchmark makes them: their shapes with random weights, and prompts for them.

Prompts hold what the model's processor makes of a 640x480 picture, so that neither it nor torchvision is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from gpu_subject import IDEFICS2_8B, TINY

from pipeline.records import EncodedSample, PromptFacts, RecordKey

Tensors = dict[str, np.ndarray[Any, Any]]

# config.json of Qwen/Qwen2.5-VL-7B-Instruct.
_QWEN_TEXT: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128_000,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0},
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# config.json of HuggingFaceTB/SmolVLM-256M-Instruct.
_SMOLVLM_TEXT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49_280,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "pad_token_id": 2,
}
_SMOLVLM_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}
_SMALL = {"vocab_size": 303, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model to build, and what its processor makes of a picture."""

    name: str
    config: Callable[[], Any]
    image_token_id: int
    image_tokens: tuple[int, ...]  # the ids that stand for a picture in the prompt, marks around it included
    num_views: int  # of a picture: tiles
    num_patches: int  # of a view
    pixels: Callable[[np.random.Generator], Tensors]
    num_words: tuple[int, int] = (20, 60)  # of a question, at least and at most

    def built(self, device: str) -> Any:
        """Random weights in bfloat16, made on the device."""
        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(0)
        config = self.config()
        with torch.device(device):
            model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
        return model.eval().requires_grad_(False)

    def samples(self, caps: list[int]) -> list[EncodedSample]:
        """A prompt for each cap, every one about a picture of its own."""
        random = np.random.default_rng(0)
        base = self.pixels(random)
        return [self._sample(random, base, number, cap) for number, cap in enumerate(caps)]

    def _sample(self, random: np.random.Generator, base: Tensors, number: int, cap: int) -> EncodedSample:
        least, most = self.num_words
        words = random.integers(5, 200, random.integers(least, most + 1))
        input_ids = np.concatenate([[1], self.image_tokens, words])[None].astype(np.int64)
        tensors: Tensors = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
        # The same noise, brighter: another picture to whoever compares, and made in no time.
        tensors |= {
            name: array + array.dtype.type(number / 64) * (array.dtype.kind == "f") for name, array in base.items()
        }
        if "image_grid_thw" in base:
            tensors["mm_token_type_ids"] = (input_ids == self.image_token_id).astype(np.int64)
        facts = PromptFacts(num_images=1, image_sha256=(str(number),))
        return EncodedSample(RecordKey(number, "default", 0), f"row {number}", tensors, facts, cap)


def _noise(random: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    return random.standard_normal(shape, dtype=np.float32)


def _idefics2(config: dict[str, Any], height: int, width: int) -> ModelShape:
    image = config["image_token_id"]
    num_latents = config["perceiver_config"]["resampler_n_latents"]
    return ModelShape(
        "Idefics2-8B, pictures whole",
        lambda: transformers.Idefics2Config(**config),
        image,
        (image,) * num_latents,
        1,
        (height // 14) * (width // 14),
        lambda random: {
            "pixel_values": _noise(random, 1, 1, 3, height, width),
            "pixel_attention_mask": np.ones((1, 1, height, width), np.int64),
        },
    )


def _qwen2_5_vl(text: dict[str, Any], vision: dict[str, Any], image: int, rows: int, columns: int) -> ModelShape:
    """rows and columns of patches; four of them make a token."""
    start, end = image - 3, image - 2
    return ModelShape(
        "Qwen2.5-VL-7B",
        lambda: transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=image,
            video_token_id=image + 1,
            vision_start_token_id=start,
            vision_end_token_id=end,
            tie_word_embeddings=False,
        ),
        image,
        (start, *(image,) * (rows * columns // 4), end),
        1,
        rows * columns,
        lambda random: {
            "pixel_values": _noise(random, rows * columns, 3 * 2 * vision["patch_size"] ** 2),
            "image_grid_thw": np.array([[1, rows, columns]], np.int64),
        },
    )


def _smolvlm(text: dict[str, Any], vision: dict[str, Any], image: int, num_tiles: int) -> ModelShape:
    size = vision["image_size"]
    num_tokens = (size // vision["patch_size"] // 4) ** 2
    mark = image - 1
    return ModelShape(
        f"SmolVLM-256M, {num_tiles} tiles",
        lambda: transformers.SmolVLMConfig(
            text_config=transformers.LlamaConfig(**text),
            vision_config=vision,
            image_token_id=image,
            scale_factor=4,
            pad_token_id=2,
            tie_word_embeddings=False,
        ),
        image,
        tuple(token for _ in range(num_tiles) for token in (mark, *(image,) * num_tokens, mark)),
        num_tiles,
        (size // vision["patch_size"]) ** 2,
        lambda random: {
            "pixel_values": _noise(random, 1, num_tiles, 3, size, size),
            "pixel_attention_mask": np.ones((1, num_tiles, size, size), np.int64),
        },
    )


# What the processors make of 640x480: the same; 34 x 46 patches; twelve tiles and the whole.
PUBLISHED: dict[str, ModelShape] = {
    "idefics2_8b": _idefics2(IDEFICS2_8B, 480, 640),
    "qwen2_5_vl_7b": _qwen2_5_vl(_QWEN_TEXT, _QWEN_VISION, 151_655, 34, 46),
    "smolvlm_256m": _smolvlm(_SMOLVLM_TEXT, _SMOLVLM_VISION, 49_190, 13),
}
_TINY_QWEN = _QWEN_VISION | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
_TINY_QWEN |= {"out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1]}
_TINY_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
_TINY_SMOLVLM = _SMOLVLM_VISION | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_TINY_SMOLVLM |= {"num_attention_heads": 2, "image_size": 64}
TINY_SHAPES: dict[str, ModelShape] = {
    "idefics2_8b": _idefics2(TINY.config, 42, 56),
    "qwen2_5_vl_7b": _qwen2_5_vl(_SMALL | _TINY_ROPE, _TINY_QWEN, 300, 4, 6),
    "smolvlm_256m": _smolvlm(_SMOLVLM_TEXT | _SMALL | {"head_dim": 16}, _TINY_SMOLVLM, 300, 3),
}

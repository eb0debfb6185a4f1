"""Random models of a few thousand weights, built from configurations alone, and ragged samples for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.records import EncodedSample, PromptFacts, RecordKey

PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END, NUM_TOKENS = 0, 1, 2, 290, 291, 292, 293, 300
ARCHITECTURES = ("smolvlm", "idefics3", "idefics2", "llava", "qwen2_vl", "qwen2_5_vl")

Array = np.ndarray[Any, Any]

_TEXT: dict[str, Any] = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
    "num_channels": 3,
}


@dataclass(frozen=True)
class Family:
    """A model, and how an image of it looks: (generator, which) -> number of image tokens, image tensors."""

    model: Any
    image: Callable[[np.random.Generator, int], tuple[int, dict[str, Array]]]
    token_types: bool = False  # the processor says which tokens are an image's


@cache
def family(name: str) -> Family:
    """A model in float32, always the same; weights are large, so that small mistakes move the logits."""
    torch.manual_seed(0)
    found = globals()[f"_{name}"]()
    model = found.model.eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            if not weight.any():  # Gemma's projection of images starts at zero
                weight.data.normal_(std=0.2)
            weight.data.mul_(3.0)
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.requires_grad_(False)
    return found  # type: ignore[no-any-return]


def samples(name: str, count: int = 6, *, text_only: bool = False, cap: int | None = None) -> list[EncodedSample]:
    """Prompts of different lengths, about images of different sizes."""
    random = np.random.default_rng(1)
    return [sample(name, random, number, text_only=text_only, cap=cap) for number in range(count)]


def sample(
    name: str, random: np.random.Generator, number: int, *, text_only: bool = False, cap: int | None = None
) -> EncodedSample:
    """A beginning, an image, and 3 + 2 * number words."""
    num_image_tokens, images = (0, {}) if text_only else family(name).image(random, number)
    words = random.integers(5, 280, 5 + 2 * number).tolist()
    input_ids = np.asarray([[BOS, *words[:2], *[IMAGE] * num_image_tokens, *words[2:]]])
    tensors = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids), **images}
    if family(name).token_types:
        tensors["mm_token_type_ids"] = (input_ids == IMAGE).astype(np.int32)
    return EncodedSample(RecordKey(number, "default", 0), f"row {number}", tensors, PromptFacts(), cap)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3, w4 ... for the numbers."""
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"w{number}": number for number in range(3, NUM_TOKENS)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def batch_of_one(one: EncodedSample) -> dict[str, torch.Tensor]:
    """What the model takes, straight from the sample."""
    return {name: torch.from_numpy(array) for name, array in one.tensors.items()}


def stream(given: list[EncodedSample]) -> Iterator[EncodedSample]:
    """The samples as an engine takes them."""
    yield from given


def _floats(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape, dtype=np.float32)


def _tiles(random: np.random.Generator, number: int) -> tuple[int, dict[str, Array]]:
    num_tiles = 1 + number % 3
    return 4 * num_tiles, {
        "pixel_values": _floats(random, 1, num_tiles, 3, 56, 56),
        "pixel_attention_mask": np.ones((1, num_tiles, 56, 56), np.int64),
    }


def _sized(random: np.random.Generator, number: int) -> tuple[int, dict[str, Array]]:
    height, width = ((28, 28), (14, 28), (28, 14), (14, 14))[number % 4]
    return 4, {
        "pixel_values": _floats(random, 1, 1, 3, height, width),
        "pixel_attention_mask": np.ones((1, 1, height, width), np.int64),
    }


def _square(random: np.random.Generator, number: int) -> tuple[int, dict[str, Array]]:
    return 4, {"pixel_values": _floats(random, 1, 3, 28, 28)}


def _grid(random: np.random.Generator, number: int) -> tuple[int, dict[str, Array]]:
    height, width = ((4, 4), (2, 4), (4, 2), (2, 2), (4, 6), (6, 4))[number % 6]
    return height * width // 4, {
        "pixel_values": _floats(random, height * width, 3 * 2 * 14 * 14),
        "image_grid_thw": np.asarray([[1, height, width]]),
    }


def _idefics3(config: Any = transformers.Idefics3Config, model: Any = None) -> Family:
    settings = config(
        vision_config=_VISION | {"image_size": 56},
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return Family((model or transformers.Idefics3ForConditionalGeneration)(settings), _tiles)


def _smolvlm() -> Family:
    return _idefics3(transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration)


def _idefics2() -> Family:
    perceiver = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4}
    settings = transformers.Idefics2Config(
        vision_config=_VISION | {"image_size": 28},
        perceiver_config=perceiver | {"num_key_value_heads": 2, "resampler_head_dim": 8},
        text_config=transformers.MistralConfig(**_TEXT, sliding_window=None),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return Family(transformers.Idefics2ForConditionalGeneration(settings), _sized)


def _llava() -> Family:
    settings = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION, image_size=28, projection_dim=32),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return Family(transformers.LlavaForConditionalGeneration(settings), _square)


def _qwen(model: Any, config: Any, **vision: Any) -> Family:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    base = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2}
    settings = config(
        text_config=_TEXT | {"rope_parameters": rope},
        vision_config=base | {"temporal_patch_size": 2, "in_channels": 3} | vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return Family(model(settings), _grid, token_types=True)


def _qwen2_vl() -> Family:
    return _qwen(transformers.Qwen2VLForConditionalGeneration, transformers.Qwen2VLConfig, embed_dim=32, mlp_ratio=2)


def _qwen2_5_vl() -> Family:
    vision = {"out_hidden_size": 32, "intermediate_size": 64, "window_size": 56, "fullatt_block_indexes": [1]}
    return _qwen(transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig, **vision)


def _t5gemma2() -> Family:
    """An encoder-decoder."""
    text = {name: value for name, value in _TEXT.items() if name != "tie_word_embeddings"}
    text |= {"head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    vision = _VISION | {"model_type": "siglip_vision_model", "image_size": 28, "vision_use_head": False}
    encoder = {"text_config": text, "vision_config": vision, "image_token_index": IMAGE, "mm_tokens_per_image": 4}
    settings = transformers.T5Gemma2Config(
        encoder=encoder, decoder=text, image_token_index=IMAGE, eoi_token_index=295, boi_token_index=294
    )
    return Family(transformers.T5Gemma2ForConditionalGeneration(settings), _square)

"""The model that the GPU suite measures: Idefics2-8B in its published size with random weights, and prompts for it.

Nothing is downloaded. The model is made on the device, saved as a folder, and from there on loaded as any other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import Idefics2Config, Idefics2ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from pipeline.records import EncodedSample, PromptFacts, RecordKey
from pipeline.tensors.batch import Batcher
from pipeline.vlm.answer import Ending
from pipeline.vlm.generation import GenerationSettings
from pipeline.vlm.identity import identify
from pipeline.vlm.load import LoadedModel, load_model
from pipeline.vlm.options import Dtype, VlmConfig
from pipeline.vlm.sampling import Sampler
from pipeline.vlm.static import StaticEngine

# config.json of HuggingFaceM4/idefics2-8b, and Mistral-7B-v0.1's where that leaves a value to its class.
IDEFICS2_8B: dict[str, Any] = {
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 32_003,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
    "perceiver_config": {
        "hidden_size": 4096,
        "rms_norm_eps": 1e-5,
        "resampler_n_latents": 64,
        "resampler_depth": 3,
        "resampler_n_heads": 16,
        "resampler_head_dim": 96,
        "num_key_value_heads": 4,
    },
    "image_token_id": 32_001,
    "tie_word_embeddings": False,
}
_TINY: dict[str, Any] = {
    "text_config": IDEFICS2_8B["text_config"]
    | {"vocab_size": 303, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "vision_config": IDEFICS2_8B["vision_config"]
    | {"hidden_size": 32, "image_size": 56, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
    "perceiver_config": IDEFICS2_8B["perceiver_config"]
    | {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4}
    | {"resampler_head_dim": 16, "num_key_value_heads": 2},
    "image_token_id": 301,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the model and the work are."""

    name: str
    config: dict[str, Any]
    edges: tuple[tuple[int, int], ...]  # height and width of pictures, as the processor scales them
    num_words: int  # of the shortest prompt
    max_new_tokens: int
    rounds: int
    num_rows: int = 16


# 980 is the longer side that Idefics2's processor makes; the shorter one is a multiple of the patch.
PUBLISHED = Sizes("Idefics2-8B as published", IDEFICS2_8B, ((980, 728), (728, 980), (980, 490), (490, 980)), 96, 64, 3)
TINY = Sizes("a tiny Idefics2", _TINY, ((56, 42), (42, 56), (56, 28), (28, 56)), 6, 8, 2)


class _Never:
    """Nobody asks the engine to stop."""

    requested = expired = False


@dataclass(frozen=True, slots=True)
class Subject:
    """The model's folder, and how long it took to make."""

    sizes: Sizes
    folder: Path
    device: str  # cuda or cpu
    num_parameters: int
    making_seconds: float  # random weights on the device
    saving_seconds: float

    def load(self, **options: Any) -> LoadedModel:
        """The model as `vlm-batch run` would load it, in bfloat16 unless the options say otherwise."""
        given = {"dtype": Dtype.bfloat16} | options
        if "device_map" not in given:
            given["device"] = self.device
        config = VlmConfig(path=str(self.folder), **given)
        return load_model(config, identify(config), num_threads=2)


def made(sizes: Sizes, device: str, folder: Path) -> Subject:
    """Make the model on the device and save it."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    started = time.perf_counter()
    with torch.device(device):
        model = Idefics2ForConditionalGeneration._from_config(Idefics2Config(**sizes.config), dtype=torch.bfloat16)
    if device == "cuda":
        torch.cuda.synchronize()
    making_seconds = time.perf_counter() - started
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    started = time.perf_counter()
    model.save_pretrained(folder)
    tokenizer(sizes).save_pretrained(folder)
    return Subject(sizes, folder, device, model.num_parameters(), making_seconds, time.perf_counter() - started)


def tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    """A word for each number."""
    words = {f"w{number}": number for number in range(sizes.config["text_config"]["vocab_size"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
    )


def prompts(sizes: Sizes, *, ragged: bool, pictures: bool = True) -> list[EncodedSample]:
    """num_rows prompts about a picture each: of one length and shape, or each of its own."""
    random = np.random.default_rng(0)
    return [_prompt(sizes, random, number, ragged=ragged, pictures=pictures) for number in range(sizes.num_rows)]


def _prompt(sizes: Sizes, random: np.random.Generator, number: int, *, ragged: bool, pictures: bool) -> EncodedSample:
    num_latents = sizes.config["perceiver_config"]["resampler_n_latents"]
    num_words = sizes.num_words * (2 + number % 5) // 2 if ragged else 2 * sizes.num_words
    words = random.integers(5, sizes.config["image_token_id"] - 5, num_words)
    image = np.full(num_latents if pictures else 0, sizes.config["image_token_id"])
    input_ids = np.concatenate([[1], image, words])[None].astype(np.int64)
    tensors: dict[str, Any] = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
    if pictures:
        height, width = sizes.edges[number % len(sizes.edges) if ragged else 0]
        tensors["pixel_values"] = random.standard_normal((1, 1, 3, height, width), dtype=np.float32)
        tensors["pixel_attention_mask"] = np.ones((1, 1, height, width), np.int64)
    return EncodedSample(RecordKey(number, "default", 0), f"row {number}", tensors, PromptFacts())


def engine(loaded: LoadedModel, *, max_rows: int) -> StaticEngine:
    """The engine of a run: greedy, each answer to its full length, which the samples say."""
    batcher = Batcher(max_rows=max_rows, max_tokens=1 << 30, max_new_tokens=1, pad_id=loaded.pad_id)
    return StaticEngine(
        loaded,
        batcher,
        Sampler(GenerationSettings().sampling, 0),
        Ending(loaded.tokenizer, eos_ids=loaded.eos_ids, stop=(), ignore_eos=True),
        settings=GenerationSettings(),
        max_new_tokens=1,
        stop=_Never(),
    )


def capped(samples: Sequence[EncodedSample], max_new_tokens: int) -> list[EncodedSample]:
    """The same samples with answers of this length."""
    return [replace(sample, max_new_tokens=max_new_tokens) for sample in samples]

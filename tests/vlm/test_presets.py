"""The presets of configs/vlm: each names a model that transformers knows, with options its image processor obeys."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from pipeline.compose import CONFIG_DIR, compose
from pipeline.config import RunConfig, answer_settings
from pipeline.prompt.template import PromptFormat
from pipeline.vlm.options import Dtype, Quantization

NOT_PRESETS = {"auto", "demo"}
PRESETS = sorted(path.stem for path in (CONFIG_DIR / "vlm").glob("*.yaml") if path.stem not in NOT_PRESETS)
HUB_NAME = re.compile(r"[A-Za-z0-9-]+/[A-Za-z0-9_.-]+")
COST = re.compile(r"A picture of 1600 x 1200 pixels costs (\d+) token")

Outputs = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What the checkpoints whose presets begin alike have in their config.json and preprocessor_config.json."""

    model_type: str
    images: str  # image processor class; its Pil variant is used, which needs no torchvision
    num_tokens: Callable[[Outputs], int] | None = None  # image tokens in the prompt, from what the processor gives
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the checkpoint, where the class has others
    plain: bool = False  # knows no chat


def tiles(num_tokens: int) -> Callable[[Outputs], int]:
    """Tokens of a processor that returns tiles [..., N, 3, height, width]."""
    return lambda outputs: num_tokens * int(np.prod(outputs["pixel_values"].shape[:-3]))


def grid(outputs: Outputs) -> int:
    """Four patches are one token."""
    return int(np.prod(outputs["image_grid_thw"])) // 4


def lines(pixels: int) -> Callable[[Outputs], int]:
    """One token for each square of that many pixels, and one at the end of each line."""

    def count(outputs: Outputs) -> int:
        height, width = outputs["image_sizes"][0] // pixels
        return int(height * (width + 1))

    return count


def square(edge: int) -> dict[str, Any]:
    return {"size": {"height": edge, "width": edge}}


def tile(edge: int) -> dict[str, Any]:
    return {"max_image_size": {"longest_edge": edge}}


QWEN = "Qwen2VLImageProcessor"
PIXTRAL = {"patch_size": {"height": 28, "width": 28}}  # 14, of which 2 x 2 are merged
# By the beginning of the preset's name; the longest one counts.
FAMILIES = {
    "idefics2_": Family("idefics2", "Idefics2ImageProcessor", tiles(64)),
    "idefics3_": Family("idefics3", "Idefics3ImageProcessor", tiles(169), tile(364)),
    "smolvlm_": Family("idefics3", "Idefics3ImageProcessor", tiles(64), tile(512)),
    "smolvlm_2_2b": Family("idefics3", "Idefics3ImageProcessor", tiles(81), tile(384)),
    "smolvlm2_": Family("smolvlm", "SmolVLMImageProcessor", tiles(64), tile(512)),
    "smolvlm2_2_2b": Family("smolvlm", "SmolVLMImageProcessor", tiles(81), tile(384)),
    "granite_docling_": Family("idefics3", "Idefics3ImageProcessor", tiles(64), tile(512)),
    "smoldocling_": Family("idefics3", "Idefics3ImageProcessor", tiles(64), tile(512)),
    "qwen2_5_vl_": Family("qwen2_5_vl", QWEN, grid),
    "qwen3_vl_": Family("qwen3_vl", QWEN, grid, {"patch_size": 16}),
    "qwen3_vl_30b_a3b": Family("qwen3_vl_moe", QWEN, grid, {"patch_size": 16}),
    "qwen3_vl_235b_a22b": Family("qwen3_vl_moe", QWEN, grid, {"patch_size": 16}),
    "qwen3_5_": Family("qwen3_5", QWEN, grid, {"patch_size": 16}),
    "internvl3_": Family("internvl", "GotOcr2ImageProcessor", tiles(256), square(448)),
    "gemma3_": Family("gemma3", "Gemma3ImageProcessor", tiles(256), square(896)),
    "gemma3n_": Family("gemma3n", "SiglipImageProcessor"),
    "gemma4_": Family("gemma4", "Gemma4ImageProcessor", lambda outputs: int(outputs["num_soft_tokens_per_image"][0])),
    "paligemma2_": Family("paligemma", "SiglipImageProcessor", plain=True),
    "llava_1_5_": Family("llava", "CLIPImageProcessor"),
    "llava_next_": Family("llava_next", "LlavaNextImageProcessor"),
    "llava_onevision_": Family("llava_onevision", "LlavaOnevisionImageProcessor"),
    "vipllava_": Family("vipllava", "CLIPImageProcessor"),
    "granite_vision_": Family("llava_next", "LlavaNextImageProcessor"),
    "pixtral_": Family("llava", "PixtralImageProcessor", lines(16), {"patch_size": {"height": 16, "width": 16}}),
    "mistral_small_": Family("mistral3", "PixtralImageProcessor", lines(28), PIXTRAL),
    "lighton_ocr_": Family("lighton_ocr", "PixtralImageProcessor", lines(28), PIXTRAL),
    "llama3_2_": Family("mllama", "MllamaImageProcessor", lambda outputs: len(outputs["num_tiles"]), square(560)),
    "llama4_": Family("llama4", "Llama4ImageProcessor"),
    "got_ocr2": Family("got_ocr2", "GotOcr2ImageProcessor", tiles(256), square(1024)),
    "paddleocr_vl": Family("paddleocr_vl", "PaddleOCRVLImageProcessor", grid),
    "aya_vision_": Family("aya_vision", "GotOcr2ImageProcessor", tiles(169), square(364)),
    "glm4_1v_": Family("glm4v", "Glm4vImageProcessor", grid),
    "lfm2_vl_": Family("lfm2_vl", "Lfm2VlImageProcessor"),
    "deepseek_vl_1_3b": Family("deepseek_vl", "DeepseekVLImageProcessor"),
    "deepseek_vl_7b": Family("deepseek_vl_hybrid", "DeepseekVLHybridImageProcessor"),
    "blip2_": Family("blip-2", "BlipImageProcessor", plain=True),
    "instructblip_": Family("instructblip", "BlipImageProcessor", plain=True),
    "florence2_": Family("florence2", "CLIPImageProcessor", plain=True),
    "kosmos2": Family("kosmos-2", "CLIPImageProcessor", plain=True),
    "git_": Family("git", "CLIPImageProcessor", plain=True),
}


@cache
def composed(preset: str) -> RunConfig:
    """The run that names the preset."""
    return compose(["prompt=caption_short", f"vlm={preset}"]).config


def family(preset: str) -> Family:
    return FAMILIES[max((name for name in FAMILIES if preset.startswith(name)), key=len)]


def image_processor_class(name: str) -> Any:
    found = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    try:
        assert found.valid_kwargs  # a stand-in for a class with a missing package raises at its first use
    except ImportError:
        pytest.skip(f"{name} needs torchvision, which is not installed")
    return found


def comment(preset: str) -> str:
    """A preset's comment as one line."""
    text = (CONFIG_DIR / "vlm" / f"{preset}.yaml").read_text()
    return " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_a_hub_model_in_bfloat16(preset: str) -> None:
    config = composed(preset)
    assert HUB_NAME.fullmatch(config.vlm.path)
    assert config.vlm.dtype is Dtype.bfloat16
    assert not config.vlm.trust_remote_code
    assert answer_settings(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_loads_a_presets_family_as_an_image_text_to_text_model(preset: str) -> None:
    assert family(preset).model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_of_a_model_without_a_chat_template_sets_the_prompt_format(preset: str) -> None:
    # vlm stands after prompt in run.yaml, so that a preset may set prompt.format whatever prompt= is chosen.
    assert (composed(preset).prompt.format is PromptFormat.plain) is family(preset).plain


def test_the_command_line_has_the_last_word_over_a_presets_prompt_format() -> None:
    assert compose(["prompt.format=chat", "vlm=florence2_base"]).config.prompt.format is PromptFormat.chat
    asked = compose(["experiment=caption_paligemma2", "dataset.path=photos", "vlm=paligemma2_10b_mix"]).config
    assert (asked.prompt.format, asked.vlm.path) == (PromptFormat.plain, "google/paligemma2-10b-mix-448")


def test_the_int8_preset_is_the_guides_model_with_another_number_format() -> None:
    plain, int8 = composed("idefics2_8b").vlm, composed("idefics2_8b_int8").vlm
    assert int8.quantization is Quantization.int8
    assert replace(int8, quantization=Quantization.none) == plain


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_processor_options_reach_the_real_image_processor(preset: str, tmp_path: Path) -> None:
    options = composed(preset).vlm.processor
    images = image_processor_class(family(preset).images)
    unknown = set(options) - set(images.valid_kwargs.__annotations__)
    assert not unknown, f"{images.__name__} has no option {unknown}; transformers would ignore it in silence"
    images(**family(preset).settings).save_pretrained(tmp_path)
    loaded = images.from_pretrained(tmp_path, **options)
    for name, wanted in options.items():
        name, wanted = _as_stored(name, wanted)
        found = getattr(loaded, name)
        if isinstance(wanted, dict):
            found = {edge: getattr(found, edge) for edge in wanted}
        assert found == wanted, name


def _as_stored(name: str, wanted: Any) -> tuple[str, Any]:
    """Processors of Qwen's kind take max_pixels and keep it as size.longest_edge."""
    edges = {"max_pixels": "longest_edge", "min_pixels": "shortest_edge"}
    return ("size", {edges[name]: wanted}) if name in edges else (name, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in PRESETS if COST.search(comment(name))])
def test_a_picture_costs_the_tokens_that_the_presets_comment_says(preset: str) -> None:
    claimed = COST.search(comment(preset))
    count = family(preset).num_tokens
    assert claimed and count, f"no way to count the tokens of {preset}"
    options = composed(preset).vlm.processor
    images = image_processor_class(family(preset).images)
    outputs = images(**family(preset).settings | options)(
        images=[Image.fromarray(np.zeros((1200, 1600, 3), np.uint8))], return_tensors="np"
    )
    assert count(outputs) == int(claimed[1])


def test_a_presets_comment_tells_its_size_and_licence() -> None:
    terms = re.compile(r"Apache|MIT|licen[cs]e|terms|License|CC-BY|CDLA", re.IGNORECASE)
    silent = [name for name in PRESETS if not terms.search(comment(name))]
    assert not silent, f"say under which licence: {silent}"


def test_the_choices_of_models_are_listed_in_lines_that_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.__main__ import main

    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for preset in PRESETS:
        assert re.search(rf"\b{preset}\b", shown), preset
    assert max(map(len, textwrap.dedent(shown).splitlines())) <= 120

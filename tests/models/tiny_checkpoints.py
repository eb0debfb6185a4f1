"""Every architecture of docs/models.md as a folder that save_pretrained wrote: random weights, real processor class.

Nothing is downloaded: configurations are written here, the tokenizer has one token for each byte. Chat templates are
our own, in the form and with the tokens of the family.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import tiny_llava
import tiny_others
import tiny_plain
import tiny_qwen
import torch
from tiny_parts import BOS, PAD, Architecture, Built, without_video

__all__ = ["ARCHITECTURES", "BOS", "PAD", "PROCESSORS_NOT_IMPORTED", "built", "save"]

_TORCHVISION = ("torchvision",)
PROCESSORS_NOT_IMPORTED = {"mistral3": "PixtralProcessor", "lfm2_vl": "Lfm2VlProcessor"}
ARCHITECTURES: dict[str, Architecture] = {
    "idefics2": Architecture(tiny_llava.idefics2),
    "idefics3": Architecture(tiny_llava.idefics3),
    "smolvlm": Architecture(tiny_llava.smolvlm, packages=("torchvision", "num2words")),
    "llava": Architecture(tiny_llava.llava),
    "llava_next": Architecture(tiny_llava.llava_next),
    "llava_onevision": Architecture(tiny_llava.llava_onevision, packages=_TORCHVISION),
    "vipllava": Architecture(tiny_llava.vipllava),
    "qwen2_vl": Architecture(tiny_qwen.qwen2_vl, packages=_TORCHVISION),
    "qwen2_5_vl": Architecture(tiny_qwen.qwen2_5_vl, packages=_TORCHVISION),
    "qwen3_vl": Architecture(tiny_qwen.qwen3_vl, packages=_TORCHVISION),
    "internvl": Architecture(tiny_others.internvl, packages=_TORCHVISION),
    "gemma3": Architecture(tiny_others.gemma3),
    "paligemma": Architecture(tiny_others.paligemma, plain="answer en {question}"),
    "mistral3": Architecture(tiny_others.mistral3, packages=_TORCHVISION, by_hand=tiny_others.mistral3_image),
    "aya_vision": Architecture(tiny_others.aya_vision),
    "got_ocr2": Architecture(tiny_others.got_ocr2),
    "mllama": Architecture(tiny_others.mllama),
    "blip-2": Architecture(tiny_plain.blip_2, plain="Question: {question} Answer:"),
    "instructblip": Architecture(tiny_plain.instructblip, plain="{question}"),
    "florence2": Architecture(tiny_plain.florence2, plain="{question}"),
    "kosmos-2": Architecture(tiny_plain.kosmos_2, plain="<grounding>{question}"),
    "git": Architecture(tiny_plain.git, plain="{question}"),
    "qwen3_5": Architecture(tiny_qwen.qwen3_5, packages=_TORCHVISION),
    "glm4v": Architecture(tiny_qwen.glm4v, packages=_TORCHVISION),
    "deepseek_vl": Architecture(tiny_others.deepseek_vl),
    "ovis2": Architecture(tiny_others.ovis2),
    "lfm2_vl": Architecture(tiny_others.lfm2_vl, packages=_TORCHVISION, by_hand=tiny_others.lfm2_vl_image),
}


@cache
def built(name: str) -> Built:
    """Always the same model, in float32; weights are large, so that small mistakes move the logits."""
    torch.manual_seed(0)
    with without_video():
        found = ARCHITECTURES[name].build()
    model = found.model.eval().requires_grad_(False)
    for key, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=weight[0].numel() ** -0.5)
        elif weight.numel() == 1 or "gate" in key:
            weight.data.fill_(0.5)  # a new Mllama has its images switched off
    return found


def save(name: str, folder: Path) -> Path:
    """The folder as a hub repository would be."""
    found = built(name)
    found.processor.save_pretrained(folder)
    found.model.save_pretrained(folder)
    return folder

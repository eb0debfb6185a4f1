"""docs/models.md from what was measured. `make models` writes it; test_models_page.py keeps it true."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from ragged import Measurement, measured
from tiny_checkpoints import ARCHITECTURES, PROCESSORS_NOT_IMPORTED, built

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
_TABLE = "<!-- table -->"
_HEAD = (
    "| `model_type` | processor class | prompt | several images | text-only rows | engine | decode loop |"
    " logit difference | remarks |\n|---|---|---|---|---|---|---|---|---|"
)


def page(exponents: Mapping[str, int]) -> str:
    """The whole text. exponents: of each architecture's bound on the logit difference, a power of ten."""
    template = (Path(__file__).with_name("models_page.md")).read_text()
    rows = [_row(name, measured(name), exponents[name]) for name in ARCHITECTURES]
    return template.replace(_TABLE, "\n".join([_HEAD, *rows]))


def measured_exponents() -> dict[str, int]:
    """Powers of ten with room for another processor's rounding: three times the difference that was measured."""
    worst = {name: max(measured(name).error, measured(name).slots_error) for name in ARCHITECTURES}
    return {name: math.ceil(math.log10(max(3 * error, 1e-6))) for name, error in worst.items()}


def documented_exponents(text: str) -> dict[str, int]:
    """Those of a page that was written before."""
    return {name: int(exponent) for name, exponent in re.findall(r"^\| `([^`]+)` .*<= 1e(-\d+)", text, re.MULTILINE)}


def _row(name: str, found: Measurement, exponent: int) -> str:
    processor = built(name).processor
    cells = [
        f"`{name}`",
        PROCESSORS_NOT_IMPORTED[name] if processor is None else type(processor).__name__,
        "chat template" if ARCHITECTURES[name].plain is None else f"plain: `{ARCHITECTURES[name].plain}`",
        _word(found.several_images),
        _word(found.text_only),
        "slots" if found.slots else "static",
        "transformers'" if found.own_loop else "ours",
        f"<= 1e{exponent}",
        "; ".join(_remarks(name, found)),
    ]
    return f"| {' | '.join(cells)} |".replace("  ", " ")


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _remarks(name: str, found: Measurement) -> list[str]:
    remarks = []
    if packages := ARCHITECTURES[name].packages:
        remarks.append(f"needs {' and '.join(packages)}")
    if not found.pads_tokens:
        remarks.append("prompts of different length do not share a batch [1]")
    if not found.pads_images:
        remarks.append("rows with different numbers of images do not share a batch [2]")
    if not found.counts_image_tokens:
        remarks.append("`num_image_tokens` is null: no token of the prompt stands for an image alone")
    return remarks


if __name__ == "__main__":
    PAGE.write_text(page(measured_exponents()))
    print(f"{PAGE} written")

"""Every file in configs/ composes, so that an unrunnable one cannot stay."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from pipeline.compose import CONFIG_DIR, compose, described
from pipeline.config import RunConfig, answer_settings

# The presets of models are composed, and looked at, in vlm/test_presets.py.
FILES = sorted(
    path.relative_to(CONFIG_DIR)
    for path in Path(CONFIG_DIR).rglob("*.yaml")
    if path.parent.name != "vlm" or path.stem in ("auto", "demo")
)
REQUIRED = ["dataset.path=somewhere", "vlm.path=somewhere", "output_dir=somewhere"]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_config_file_composes(file: Path) -> None:
    choice = [f"{file.parent}={file.stem}"] if len(file.parts) == 2 else []
    config = compose([*choice, *REQUIRED]).config
    assert isinstance(config, RunConfig)
    assert answer_settings(config)


def test_every_key_is_explained() -> None:
    for choice in ([], ["dataset=images"], ["dataset=hub"], ["generation=sample"]):
        for key, _, doc in described(choice):
            assert len(doc) > 5, f"{key} has no sentence for --help"


def test_options_have_slots_so_that_an_unknown_key_cannot_slip_in() -> None:
    def check(node: object) -> None:
        assert not hasattr(node, "__dict__"), f"{type(node).__name__} needs slots=True"
        for entry in fields(node):  # type: ignore[arg-type]
            if is_dataclass(value := getattr(node, entry.name)):
                check(value)

    check(compose(REQUIRED).config)

"""The whole program on a folder of each architecture: every photo is answered, in any batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ragged import SIZES, measured, picture
from tiny_checkpoints import ARCHITECTURES, built, save

from pipeline.__main__ import main

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        picture(random, *size).save(folder / f"{number}.png")
    return folder


def words(name: str, model: Path, photos: Path, output_dir: Path, max_rows: int) -> list[str]:
    """The command line for an architecture."""
    plain = ARCHITECTURES[name].plain
    question = "What is it?" if plain is None else plain.format(question="What is it?")
    return [
        "run",
        "vlm=auto",
        f"vlm.path={model}",
        "dataset=images",
        f"dataset.path={photos}",
        f"output_dir={output_dir}",
        f"prompt.user={question}",
        f"prompt.format={'chat' if plain is None else 'plain'}",
        "generation.max_new_tokens=6",
        "generation.ignore_eos=true",
        "engine.num_workers=1",
        f"engine.max_batch_rows={max_rows}",
    ]


def rows_of(output_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output_dir / "data" / "part-00000.parquet").to_pylist()
    return rows


def missing(name: str) -> list[str]:
    return [package for package in ARCHITECTURES[name].packages if importlib.util.find_spec(package) is None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_photo_is_answered_and_answers_do_not_depend_on_the_batch(
    name: str, photos: Path, tmp_path: Path
) -> None:
    if packages := missing(name):
        pytest.skip(f"its processor needs {' and '.join(packages)}")
    model = save(name, tmp_path / "model")
    together, apart = tmp_path / "together", tmp_path / "apart"
    assert main(words(name, model, photos, together, max_rows=8)) == 0
    assert main(words(name, model, photos, apart, max_rows=1)) == 0
    rows = rows_of(together)
    assert len(rows) == len(SIZES)
    for row in rows:
        assert row["status"] == "ok", row["error_message"]
        assert row["num_generated_tokens"] == 6
        assert row["num_prompt_tokens"] > 0
        assert (row["num_image_tokens"] or 0) > 0 or not measured(name).counts_image_tokens
    assert [row["response"] for row in rows] == [row["response"] for row in rows_of(apart)]


@pytest.mark.slow
def test_the_command_does_the_same(vlm_batch: Any, photos: Path, tmp_path: Path) -> None:
    model = save("idefics2", tmp_path / "model")
    vlm_batch(*words("idefics2", model, photos, tmp_path / "out", max_rows=8))
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["ok"] * len(SIZES)


@pytest.mark.parametrize("name", ["qwen2_vl", "smolvlm"])
def test_a_missing_package_is_named_before_any_photo_is_opened(
    name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages = missing(name)
    if not packages:
        pytest.skip(f"{' and '.join(ARCHITECTURES[name].packages)} are installed")
    model = save(name, tmp_path / "model")
    assert main(words(name, model, photos, tmp_path / "out", max_rows=8)) == 1
    said = capsys.readouterr().err
    assert any(f"pip install {package}" in said for package in packages)
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("data/*.parquet"))


def test_every_architecture_can_be_built_here() -> None:
    assert all(built(name).model.num_parameters() < 300_000 for name in ARCHITECTURES)

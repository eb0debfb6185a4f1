"""README.md of a run: it says what lies there, it loads, and nobody's own words are lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from answered_run import FAULT, answered_run, manifest, pictures
from markdown_it import MarkdownIt
from small_run import tree

from pipeline.card import CardFacts, card_text, is_ours
from pipeline.manifest import write_manifest
from pipeline.plan import Plan, plan_of_run
from pipeline.status import read_status
from pipeline.write.schema import WriteConfig

HOSTILE = [
    "<script>alert(1)</script>", "| a | b |", "```\n# heading", "`tick`", "[a](javascript:alert(1))", "![x](http://h/x)",
    "---\nlicense: mit", "@everyone #1", "www.evil.example", "a\\|b`c", "\x1b[2J", "https://user:pass@host/x",
    "&lt;b&gt;",
]  # fmt: skip


def conclude(output_dir: Path) -> None:
    assert write_manifest(output_dir, read_status(output_dir))


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(card.split("\n---\n")[0])
    return found


def small_run(folder: Path, **more: Any) -> Path:
    source = pictures(folder / "pictures", *(f"{number}.png" for number in range(5)))
    answered_run(folder / "run", source, lambda row, key: FAULT if row.index == 3 else "a cat", **more)
    return folder / "run"


def test_the_folder_of_a_run_loads_as_a_dataset(tmp_path: Path) -> None:
    """Its plan, heartbeats and exports are no part of it."""
    output = small_run(tmp_path)
    (output / "export").mkdir()
    (output / "export/answers.jsonl").write_text('{"other": 1}\n')
    loaded = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["response"][:] == ["a cat"] * 3 + [None, "a cat"] and "row_key" in loaded.column_names


def test_what_the_card_says_of_loading_runs(tmp_path: Path) -> None:
    for name, write in {
        "plain": WriteConfig(),
        "named": WriteConfig(prefix="v\"'", response_column="my words"),
    }.items():
        output = small_run(tmp_path / name, write=write)
        [code] = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)
        environment = os.environ | {"HF_HOME": str(tmp_path / "home" / name)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=output, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("a cat") >= 1 + 4 + 4 and "error" in done.stdout


def test_front_matter_and_counts(tmp_path: Path) -> None:
    card = (small_run(tmp_path, prompt_names=("p", "q"), num_samples=2) / "README.md").read_text()
    front = front_matter(card)
    assert (front["license"], front["size_categories"]) == ("unknown", ["n<1K"])
    assert front["task_categories"] == ["image-text-to-text"]
    assert front["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    ]
    for line in ("| rows | 5 |", "| records | 20 |", "| answers | 16 |", "| errors | 4 |", "| name | `org/model` |"):
        assert line in card
    assert "- 4 x `decode/UnidentifiedImageError`" in card and "| engine | `none` |" in card
    text_only = manifest(tmp_path / "source", [{"a": 1}])
    answered_run(tmp_path / "text", text_only)
    assert front_matter((tmp_path / "text/README.md").read_text())["task_categories"] == ["text-generation"]


def test_a_card_that_is_not_ours_or_was_edited_stays(tmp_path: Path) -> None:
    output = small_run(tmp_path)
    card = output / "README.md"
    ours = card.read_bytes()
    for other in (
        b"# mine",
        ours.replace(b"license: unknown", b"license: mit"),
        ours + b"More of mine.\n",
        b"",
        b"\xff",
    ):
        card.write_bytes(other)
        before = tree(output)
        conclude(output)
        assert tree(output) == before
    assert is_ours(ours) and not is_ours(ours.replace(b"\n", b"\r\n"))


def test_a_card_of_ours_is_renewed_and_a_link_is_left(tmp_path: Path) -> None:
    output = small_run(tmp_path)
    card = output / "README.md"
    now = card.read_text()
    plan = plan_of_run(output)
    earlier = card_text(plan, CardFacts(num_records=5, errors={"read/Gone": 2}))
    card.write_text(earlier)
    conclude(output)
    assert card.read_text() == now != earlier and not (output / "work").exists()
    before = tree(output)
    conclude(output)
    assert tree(output) == before
    (tmp_path / "elsewhere.md").write_text(earlier)
    card.unlink()
    card.symlink_to(tmp_path / "elsewhere.md")
    conclude(output)
    assert card.is_symlink() and (tmp_path / "elsewhere.md").read_text() == earlier


def test_a_card_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = small_run(tmp_path)
    (output / "README.md").unlink()
    (output / "README.md").mkdir()
    (output / "manifest.json").unlink()
    conclude(output)
    assert (output / "manifest.json").exists() and "README.md, the dataset card, cannot be written" in caplog.text


def test_an_unfinished_run_has_no_card(tmp_path: Path) -> None:
    assert not (small_run(tmp_path, only_shards=[0]) / "README.md").exists()


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_users_is_no_markup(text: str, tmp_path: Path) -> None:
    names = ("prompt.user", "prompt.system", "vlm.path", "vlm.revision", "dataset.path")
    settings = dict.fromkeys(names, text) | {"generation.stop": [text]}
    source = pictures(tmp_path / "pictures", "a.png")
    plan = answered_run(tmp_path / "run", source, settings=settings)
    card = (tmp_path / "run/README.md").read_text()
    assert front_matter(card)["license"] == "unknown" and is_ours(card.encode())
    assert "\x1b" not in card and "pass@" not in card
    other = card_text(plan, CardFacts(num_records=1, errors={text: 1}, license=text))
    assert front_matter(other)["license"] == text
    for number, shown in ((6, card), (7, other)):
        markdown = MarkdownIt("commonmark").enable("table").parse(shown.split("\n---\n", 1)[1])
        inline = [token for block in markdown for token in block.children or ()]
        kinds = [token.type for token in (*markdown, *inline)]
        assert kinds.count("heading_open") == number and kinds.count("table_open") == 3
        assert not {"link_open", "image", "hr", "html_block"} & set(kinds[1:])  # the first is the mark
        assert {token.content for token in inline if token.type == "html_inline"} <= {"<code>", "</code>"}
        bare = " ".join(token.content for token in inline if token.type == "text")
        assert "www." not in bare and "@everyone" not in bare and "://" not in bare  # what the hub would make links of


def test_paths_of_this_machine_are_not_published(tmp_path: Path) -> None:
    settings = {"vlm.path": "/home/me/private/models/good-model", "dataset.root": "/home/me/private"}
    source = pictures(tmp_path / "secret place" / "pictures", "a.png")
    answered_run(tmp_path / "run", source, settings=settings)
    card = (tmp_path / "run/README.md").read_text()
    assert "# Answers of `good-model`" in card and "about images of `pictures`" in card
    assert "/home/me" not in card and "secret place" not in card


def test_a_secret_of_the_environment_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken1234")
    source = pictures(tmp_path / "pictures", "a.png")
    plan: Plan = answered_run(tmp_path / "run", source, settings={"prompt.user": "hf_averysecrettoken1234"})
    assert "averysecret" not in (tmp_path / "run/README.md").read_text()
    assert "averysecret" not in card_text(plan, CardFacts(num_records=1, errors={}))

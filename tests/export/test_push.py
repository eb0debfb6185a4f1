"""format=hub, pushed to a small hub on this machine; no test here has seen the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from answered_run import FAULT, answered_run, manifest
from command_line import CHECKOUT
from small_hub import SmallHub, serving

from pipeline.card import is_ours
from pipeline.errors import UsageError
from pipeline.export import hub as hub_module
from pipeline.export.formats import exported
from pipeline.export.options import ExportOptions, Format

TOKEN = "hf_averysecrettoken1234567890"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    source = manifest(tmp_path / "source", [{"name": f"n{number}"} for number in range(7)])
    answered_run(tmp_path / "run", source, lambda row, key: FAULT if row.index == 6 else f"says {row.id}")
    return tmp_path / "run"


def push(hub: SmallHub, output: Path, *words: str, code: int = 0) -> str:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(output.parent / "home"),
        "PYTHONPATH": str(CHECKOUT),
    }
    line = [sys.executable, "-m", "pipeline", "export", f"output_dir={output}", "format=hub", "repo_id=me/answers"]
    done = subprocess.run(
        [*line, *words], env=environment, cwd=output.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr and "HTTP Request" not in done.stderr
    return done.stdout + done.stderr


def test_shards_and_card_are_pushed_in_one_commit(output: Path) -> None:
    with serving(SmallHub()) as hub:
        printed = push(hub, output, "license=cc-by-4.0")
    assert "written  7 records as hub, at " in printed and "/datasets/me/answers" in printed
    assert len(hub.commits) == 1 and hub.tokens == {f"Bearer {TOKEN}"}
    assert [(repo["name"], repo["visibility"], repo["type"]) for repo in hub.created] == [
        ("answers", "private", "dataset")
    ]
    shards = {f"data/{path.name}": path.read_bytes() for path in (output / "data").iterdir()}
    assert {name: data for name, data in hub.files.items() if name != "README.md"} == shards
    card = hub.files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0" and front["configs"][0]["data_files"][0]["path"] == "data/*.parquet"
    assert "| answers | 6 |" in card and "1 x `decode/UnidentifiedImageError`" in card and is_ours(card.encode())


@pytest.mark.slow  # four pushes
def test_data_that_is_there_stays_unless_told_otherwise(output: Path) -> None:
    with serving(SmallHub()) as hub:
        hub.files = {"data/train-0.parquet": b"theirs", "README.md": b"# mine", "notes.txt": b"notes"}
        assert "exists=overwrite replaces them" in push(hub, output, code=2)
        assert not hub.commits
        printed = push(hub, output, "exists=overwrite", "private=false")
        assert "it stays as it is" in printed and hub.files["README.md"] == b"# mine"
        assert sorted(hub.files) == [
            "README.md", "data/part-00000.parquet", "data/part-00001.parquet", "data/part-00002.parquet", "notes.txt",
        ]  # fmt: skip
        assert hub.created[-1]["visibility"] == "public"
        hub.files["README.md"] = (output / "README.md").read_bytes()  # ours: a newer one may take its place
        push(hub, output, "exists=overwrite", "license=mit")
        assert b"license: mit" in hub.files["README.md"]


def test_chosen_records_are_pushed_and_the_card_says_so(output: Path) -> None:
    with serving(SmallHub()) as hub:
        printed = push(hub, output, "errors=skip", "fail_phrases=says 1")
    assert "written  5 records" in printed and "1 x error decode/UnidentifiedImageError" in printed
    tables = [pq.read_table(BytesIO(data)) for name, data in hub.files.items() if name.endswith(".parquet")]
    assert [row["id"] for table in tables for row in table.to_pylist()] == ["0", "2", "3", "4", "5"]
    assert sorted(hub.files) == ["README.md", "data/part-00000.parquet", "data/part-00001.parquet"]
    card = hub.files["README.md"].decode()
    assert "5 records that were chosen from 7" in card and "| errors | 0 |" in card and "## Errors" not in card


@pytest.mark.slow
def test_a_hub_that_refuses(output: Path) -> None:
    with serving(SmallHub(refuses=403)) as hub:
        printed = push(hub, output, code=1)
    assert "me/answers cannot be pushed: " in printed and "403" in printed and "Traceback" not in printed
    hub.url = "http://127.0.0.1:9"
    assert "cannot be pushed" in push(hub, output, code=1)


def test_wrong_names_are_refused_before_anything_is_sent(output: Path) -> None:
    for repo_id in (None, "a/b/c", "me/..", "me/a b"):
        with pytest.raises(UsageError, match="repo_id="):
            exported(output, ExportOptions(format=Format.hub, repo_id=repo_id))


class Recorder:
    """An HfApi that keeps what it is asked for."""

    def __init__(self) -> None:
        self.commits: list[list[str]] = []

    def create_repo(self, repo_id: str, **words: object) -> str:
        return repo_id

    def list_repo_files(self, repo_id: str, **words: object) -> list[str]:
        return ["data/part-00000.parquet", "data/part-00009.parquet"]

    def create_commit(self, repo_id: str, operations: list[object], **words: object) -> None:
        for operation in operations:
            source = getattr(operation, "path_or_fileobj", b"")
            assert isinstance(source, bytes) or Path(source).is_file()
        self.commits.append([f"{type(entry).__name__[15:]} {entry.path_in_repo}" for entry in operations])  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [{}, {"fail_phrases": ["never"]}])
def test_many_files_are_several_commits_and_the_card_comes_last(
    words: dict[str, list[str]], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "_MOST_FILES", 2)
    api = Recorder()
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    exported(output, ExportOptions(format=Format.hub, repo_id="me/answers", exists="overwrite", **words))  # type: ignore[arg-type]
    assert api.commits == [
        ["Add data/part-00000.parquet", "Add data/part-00001.parquet"],
        ["Add data/part-00002.parquet", "Add README.md", "Delete data/part-00009.parquet"],
    ]

"""What a model, a row or a file name says is text: on a terminal, in logs, in what is written."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
from hostile_run import data_uri, png, records, start

from pipeline.preview.terminal import Terminal

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</textarea></title></style><svg onload=alert(1)>",
    '" onmouseover="alert(1)',
    "[a](javascript:alert(1)) ![x](http://127.0.0.1/?leak)",
    "=cmd|'/c calc'!A1",
    "+1+cmd", "-1", "@SUM(A1)", "\t=1", "\r=1",
    "\x1b[2J\x1b]0;title\x07\x1b]8;;http://127.0.0.1\x07click\x1b]8;;\x07",
    "\x9b31m\x85\x90", "\x08\x08\x08ok", "\x7f", "a\nstate    done\nb", "\ud7ff\ufffe\u202egpj.exe",
]  # fmt: skip
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# The model's answers, and what ends a row in an error, in the worker process as well.
ANSWERS = """
import fake_model
class Engine(fake_model.FakeEngine):
    def answers(self, samples):
        from dataclasses import replace
        from pipeline.records import Fault, Stage
        hostile = {hostile!r}
        for answer in super().answers(samples):
            text, kind = hostile[answer.key.row_index], f"Odd{{answer.key.row_index}}"
            if {fails}:
                yield replace(answer, response=None, finish_reason=None, fault=Fault(Stage.GENERATE, kind, text))
            else:
                yield replace(answer, response=text)
fake_model.FakeEngine = Engine
"""


def rows_at(path: Path) -> None:
    lines = [json.dumps({"image": data_uri(), "id": f"{n} {text}", "title": text}) for n, text in enumerate(HOSTILE)]
    path.write_text("\n".join(lines))


WORDS = ["dataset=jsonl", "dataset.path=rows.jsonl", "dataset.id_column=id", "prompt.user={{ title }}"]


def test_answers_are_written_as_they_are(tmp_path: Path) -> None:
    """Fault S-8: markup, formulas and escape sequences in answers, prompts and ids: kept whole, never shown."""
    rows_at(tmp_path / "rows.jsonl")
    printed = start(tmp_path, *WORDS, prelude=ANSWERS.format(hostile=HOSTILE, fails=False))
    rows = records(tmp_path)
    assert [row["response"] for row in rows] == HOSTILE
    assert [row["title"] for row in rows] == HOSTILE
    assert [row["id"] for row in rows] == [f"{n} {text}" for n, text in enumerate(HOSTILE)]
    assert not _STEERS.search(printed), printed


def test_errors_that_quote_a_row_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """Fault S-8: the examples of errors at the end of a run quote ids and messages of rows: no ESC, no line of ours."""
    rows_at(tmp_path / "rows.jsonl")
    printed = start(tmp_path, *WORDS, prelude=ANSWERS.format(hostile=HOSTILE, fails=True))
    for number in range(len(HOSTILE)):
        assert f"example  generate/Odd{number}: {number} " in printed
    assert sum(line.startswith("state ") for line in printed.splitlines()) == 1, printed
    assert [row["error_message"] for row in records(tmp_path)] == HOSTILE
    for command in ("status", "audit"):
        printed += start(tmp_path, *WORDS, command=command)
    assert not _STEERS.search(printed), printed


@pytest.mark.slow
def test_file_names_and_columns_that_mean_harm(tmp_path: Path) -> None:
    """Fault S-8: escape sequences in names of files, folders, columns and settings: none in any message."""
    folder = tmp_path / "in\x1b[2J"
    folder.mkdir()
    for number, text in enumerate(HOSTILE):
        if "/" not in text:
            (folder / f"{number} {text}.png").write_bytes(png() if number % 2 else b"no picture")
    (folder / ".hidden\x1b[31m").write_text("")  # a warning names the folder that it is in
    (folder / "\x1b[31m.xyz").write_text("")
    os.symlink("nowhere", folder / "\x1b]0;x\x07.jpg")
    printed = start(tmp_path, "dataset=images", f"dataset.path={folder}")
    assert "1 hidden files or folders skipped" in printed
    assert "example  " in printed
    assert not _STEERS.search(printed), printed
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a", "\x1b[2J": 1}))
    for word in (
        "dataset.id_column=\x1b[31m",
        "prompt.user={{ \x1b[31m }}",
        "prompt.user={{ absent }}",
        "\x1b[31m=1",
        "\x1b[31m",
    ):
        printed = start(tmp_path, "dataset=jsonl", "dataset.path=rows.jsonl", "output_dir=other", word, code=2)
        assert not _STEERS.search(printed), printed


def test_a_preview_shows_hostile_text_as_text() -> None:
    """Fault S-8: a preview, whole or in pieces of one character: labels are ours alone, and nothing steers."""
    for text in HOSTILE:
        out = io.StringIO()
        terminal = Terminal(out)
        terminal.begin("answer")
        for character in text:
            terminal.add(character)
        terminal.end()
        terminal.line("error", text)
        assert not _STEERS.search(out.getvalue())
        labels = [line[:8].rstrip() for line in out.getvalue().split("\n") if line[:8].strip()]
        assert labels == ["answer", "error"]

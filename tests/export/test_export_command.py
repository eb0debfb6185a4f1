"""vlm-batch export as people type it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from answered_run import FAULT, answered_run, manifest, pictures
from command_line import CHECKOUT

from pipeline.__main__ import main
from pipeline.export.options import Format

Printed = pytest.CaptureFixture[str]


def test_what_was_written_and_what_was_not_is_said(tmp_path: Path, capsys: Printed) -> None:
    says = {"a.png": FAULT, "b.png": "I'm sorry", "c.png": "A \x1b[2Jcat."}
    source = pictures(tmp_path / "pictures", *says)
    answered_run(tmp_path / "run", source, lambda row, key: says[row.id])
    words = ["fail_phrases=I cannot", "fail_phrases=I'm sorry", "prefix=my cat, "]
    assert main(["export", f"output_dir={tmp_path}/run", "format=txt", *words]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"written  1 record as txt, beside the images in {tmp_path}/pictures",
        "left out 2",
        "           1 x error decode/UnidentifiedImageError",
        '           1 x with the phrase "I\'m sorry"',
    ]
    assert (tmp_path / "pictures/c.txt").read_text() == "my cat, A \x1b[2Jcat."
    assert main(["export", f"output_dir={tmp_path}/run", "format=txt", "exists=append", "separator=, ", *words]) == 0
    assert "1 x files that have these words there already" in capsys.readouterr().out


def test_what_should_have_been_written_and_was_not_is_a_failure(tmp_path: Path, capsys: Printed) -> None:
    answered_run(tmp_path / "run", manifest(tmp_path / "source", [{"n": "../\x1b[2J"}, {"n": "b"}], id_column="n"))
    assert main(["export", f"output_dir={tmp_path}/run", "format=txt", f"to={tmp_path}/texts"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "failed   1",
        "           1 x ids that are no path inside a folder, e.g. '../\\x1b[2J'",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "format= is not given. Formats: txt, caption, jsonl, csv, llava"),
        (["format=yaml"], "format=yaml"),
        (["format=csv", "prefix=x"], "prefix= means nothing with format=csv"),
        (["format=csv", "private=false"], "private= means nothing with format=csv"),
        (["format=txt", "errors=include"], "errors= means nothing with format=txt"),
        (["format=txt", "columns=[id]"], "columns= means nothing with format=txt"),
        (["format=hub", "to=x"], "to= means nothing with format=hub"),
        (["format=jsonl", "fail_phrases=['']"], "empty phrase"),
        (["format=jsonl", "tar_samples=0"], "expected at least 1"),
        (["format=jsonl", "formt=x"], "Did you mean 'format'"),
        (["format=jsonl", "sample_index=-1"], "expected at least 0"),
    ],
)
def test_wrong_words_are_refused(words: list[str], said: str, tmp_path: Path, capsys: Printed) -> None:
    answered_run(tmp_path / "run", manifest(tmp_path / "source", [{"a": 1}]))
    assert main(["export", f"output_dir={tmp_path}/run", *words]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "Traceback" not in printed
    assert not (tmp_path / "run/export").exists()


def test_no_run_is_wrong_usage(tmp_path: Path, capsys: Printed) -> None:
    assert main(["export", f"output_dir={tmp_path}", "format=jsonl"]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_help_names_every_word_and_format(capsys: Printed) -> None:
    assert main(["export", "--help"]) == 0
    printed = capsys.readouterr().out
    for word in [*Format, "exists=null", "fail_phrases=[]", "output_dir=null"]:
        assert str(word) in printed


def test_export_needs_no_model(tmp_path: Path) -> None:
    answered_run(tmp_path / "run", pictures(tmp_path / "pictures", "a.png"))
    script = f"""
import sys
from pipeline.__main__ import main
for format in ("txt", "csv", "webdataset", "llava"):
    assert main(["export", "output_dir={tmp_path}/run", f"format={{format}}"]) == 0
assert not {{"torch", "transformers", "datasets", "huggingface_hub"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=CHECKOUT, timeout=60)

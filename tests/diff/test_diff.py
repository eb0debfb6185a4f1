"""vlm-batch diff: what became of every record from one run to the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import CHECKOUT, CommandLine
from small_run import COLUMNS, tree
from two_runs import OUT_OF_MEMORY, UNREADABLE, diff, make_run, parquet

from pipeline.diff import pairs
from pipeline.diff.command import run_diff
from pipeline.diff.options import DiffOptions
from pipeline.errors import RunFailed, UsageError
from pipeline.overwrite import move_aside
from pipeline.records import RecordKey


def test_every_record_has_one_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = ["a cat", "A  Cat ", "a cat", "a cat", UNREADABLE, UNREADABLE, UNREADABLE, "a dog"]
    b = ["a cat", "a cat", "a dog", UNREADABLE, "a cat", UNREADABLE, OUT_OF_MEMORY, "a dog"]
    make_run(tmp_path / "a", lambda key: a[key.row_index], 8)
    make_run(tmp_path / "b", lambda key: b[key.row_index], 8)
    found, said = diff(capsys, tmp_path / "a", tmp_path / "b")
    assert found["changes"] == {
        "same": 2,
        "same_normalized": 1,
        "changed": 1,
        "only_a_answered": 1,
        "only_b_answered": 1,
        "same_error": 1,
        "other_error": 1,
        "only_in_a": 0,
        "only_in_b": 0,
    }
    assert (found["num_records"], found["num_compared"], found["share_same"]) == (8, 8, 3 / 8)
    kind = "decode/UnidentifiedImageError"
    crossed = {(entry["a"], entry["b"]): entry["num_records"] for entry in found["errors"]}
    assert crossed == {(None, kind): 1, (kind, None): 1, (kind, kind): 1, (kind, "generate/OutOfMemoryError"): 1}
    assert f"1  answered -> {kind}" in said
    assert "  changed                     1   12.5%  another answer" in said


def test_a_run_is_the_same_as_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: UNREADABLE if key.row_index == 2 else f"row {key.row_index}")
    before = tree(tmp_path / "a")
    found, said = diff(capsys, tmp_path / "a", tmp_path / "a", min_same=1.0)
    assert found["share_same"] == 1.0
    assert found["settings"] == found["versions"] == found["numerics"] == []
    assert found["similarity"] == {"mean": 1.0, "lowest": 1.0, "p5": 1.0, "median": 1.0}
    assert "settings" not in said
    assert tree(tmp_path / "a") == before


def test_min_same_fails_the_command_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: "a cat")
    make_run(tmp_path / "b", lambda key: "a dog" if key.row_index == 5 else "a cat")
    assert "FAILED" not in diff(capsys, tmp_path / "a", tmp_path / "b")[1]
    assert "FAILED" not in diff(capsys, tmp_path / "a", tmp_path / "b", min_same=5 / 6)[1]
    _, said = diff(capsys, tmp_path / "a", tmp_path / "b", min_same=0.84, code=1)
    assert said.splitlines()[-1] == "FAILED    83.3333% of 6 records are the same; min_same=0.84"


def test_an_unfinished_run_is_compared_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: "a cat", 9)
    make_run(tmp_path / "b", lambda key: "a cat", 9, num_shards=2)
    found, said = diff(capsys, tmp_path / "a", tmp_path / "b", min_same=1.0, code=1)
    assert (found["num_compared"], found["changes"]["only_in_a"]) == (6, 3)
    assert (found["b"]["num_published"], found["b"]["num_planned"]) == (6, 9)
    assert "UNFINISHED: 6 of 9 are published" in said
    assert diff(capsys, tmp_path / "b", tmp_path / "a")[0]["changes"]["only_in_b"] == 3


@pytest.mark.parametrize("shard_rows", [1, 2, 3, 100])
def test_shards_of_another_size_change_nothing(
    shard_rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", lambda key: f"{key.row_index} {key.sample_index}", 7, num_samples=2)
    make_run(
        tmp_path / "b",
        lambda key: f"{key.row_index} {key.sample_index}" + "!" * (key == RecordKey(4, "default", 1)),
        7,
        num_samples=2,
        shard_rows=shard_rows,
    )
    found, _ = diff(capsys, tmp_path / "a", tmp_path / "b")
    assert (found["changes"]["same"], found["changes"]["changed"], found["num_records"]) == (13, 1, 14)


def test_a_few_files_at_a_time_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of runs that are larger than memory; here every file of a is a block of its own."""
    monkeypatch.setattr(pairs, "_BLOCK_BYTES", 1)
    make_run(tmp_path / "a", lambda key: f"row {key.row_index}", 9, shard_rows=2)
    make_run(tmp_path / "b", lambda key: f"row {key.row_index % 8}", 9, shard_rows=4)
    rows = tmp_path / "rows.parquet"
    found, _ = diff(capsys, tmp_path / "a", tmp_path / "b", by=["year"], changed_rows=str(rows))
    assert (found["changes"]["same"], found["changes"]["changed"]) == (8, 1)
    assert found["by"]["year"]["values"][-1]["changes"]["changed"] == 1
    assert pq.read_table(rows)["b_response"].to_pylist() == ["row 0"]


def test_rows_in_another_order_find_their_partner_by_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: f"row {key.row_index}", 8)
    make_run(tmp_path / "b", lambda key: f"row {7 - key.row_index}", 8, ids=lambda index: f"{7 - index:05d}.jpg")
    assert diff(capsys, tmp_path / "a", tmp_path / "b")[0]["changes"]["same"] == 8
    assert diff(capsys, tmp_path / "a", tmp_path / "b", key="row_index")[0]["changes"]["changed"] == 8


def test_other_ids_can_be_joined_by_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: "a cat")
    make_run(tmp_path / "b", lambda key: "a cat", ids=lambda index: f"other/{index}")
    with pytest.raises(UsageError, match=r"no record of a is in b: a has '00000.jpg'.* b has 'other/0'.*key=COLUMN"):
        diff(capsys, tmp_path / "a", tmp_path / "b")
    found, _ = diff(capsys, tmp_path / "a", tmp_path / "b", key="path")
    assert (found["changes"]["same"], found["joined_by"]) == (6, "path, sample_index")
    assert diff(capsys, tmp_path / "a", tmp_path / "b", key="row_index")[0]["changes"]["same"] == 6


def test_names_of_columns_may_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: f"row {key.row_index}")
    other = {"write.prefix": "vlm_", "write.response_column": "caption"}
    make_run(tmp_path / "b", lambda key: f"row {key.row_index}", settings=other)
    found, said = diff(capsys, tmp_path / "a", tmp_path / "b", by=["year"])
    assert found["changes"]["same"] == 6
    assert {entry["name"]: entry["b"] for entry in found["settings"]} == other
    assert "write.response_column\n              a  response\n              b  caption" in said
    assert diff(capsys, tmp_path / "b", tmp_path / "a", key="row_index", by=["prompt_name"])[0]["num_compared"] == 6


def test_two_prompts_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = {"short": "Name it.", "long": "Describe it."}
    make_run(
        tmp_path / "a",
        lambda key: "a cat" if key.prompt_name == "short" or key.row_index else "a cat on a mat",
        prompt_names=("short", "long"),
        settings={"prompt.variants": variants},
    )
    found, said = diff(capsys, tmp_path / "a", tmp_path / "a", a_prompt="short", b_prompt="long")
    assert (found["changes"]["same"], found["changes"]["changed"], found["num_records"]) == (5, 1, 6)
    assert found["settings"] == [{"name": "prompt.user", "a": "Name it.", "b": "Describe it."}]
    assert (found["a"]["label"], found["b"]["label"]) == ("short", "long")
    assert (found["a"]["num_records"], found["a"]["num_published"]) == (6, 12)
    assert "a cat" not in said


def test_several_prompts_are_compared_each_with_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: key.prompt_name, prompt_names=("x", "y"))
    make_run(tmp_path / "b", lambda key: key.prompt_name, prompt_names=("y", "z"))
    found, _ = diff(capsys, tmp_path / "a", tmp_path / "b")
    assert {name: number for name, number in found["changes"].items() if number} == {
        "same": 6,
        "only_in_a": 6,
        "only_in_b": 6,
    }
    assert found["joined_by"] == "id, prompt_name, sample_index"
    with pytest.raises(UsageError, match=r"a_prompt=xx: a has no such prompt. Did you mean 'x'\? Its prompts are x, y"):
        diff(capsys, tmp_path / "a", tmp_path / "b", a_prompt="xx")


def test_one_prompt_each_is_compared_whatever_it_is_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: "a cat", prompt_names=("x",))
    make_run(tmp_path / "b", lambda key: "a cat", prompt_names=("y",))
    assert diff(capsys, tmp_path / "a", tmp_path / "b")[0]["changes"]["same"] == 6


def test_texts_in_another_unicode_form_are_the_same_but_for_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    make_run(tmp_path / "a", lambda key: composed, 1)
    make_run(tmp_path / "b", lambda key: decomposed, 1)
    found, _ = diff(capsys, tmp_path / "a", tmp_path / "b")
    assert (found["changes"]["same"], found["changes"]["same_normalized"]) == (0, 1)
    make_run(tmp_path / "c", lambda key: "x2", 1)
    make_run(tmp_path / "d", lambda key: "x\u00b2", 1)
    assert diff(capsys, tmp_path / "c", tmp_path / "d")[0]["changes"]["changed"] == 1


def test_lengths_endings_images_and_prompts_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: "cat")
    make_run(
        tmp_path / "b",
        lambda key: "a cat" if key.row_index else "ox",
        prompt="And now?",
        image=lambda index: f"picture {max(1, index)}" if index < 5 else "",  # one could not be read
    )
    found, said = diff(capsys, tmp_path / "a", tmp_path / "b")
    lengths = found["num_generated_tokens"]
    assert (lengths["a"]["mean"], lengths["b"]["mean"], lengths["b"]["most"]) == (3.0, 4.5, 5)
    assert (lengths["num_longer_in_b"], lengths["num_shorter_in_b"]) == (5, 1)
    assert found["finish_reasons"] == [{"a": "stop", "b": "stop", "num_records": 6}]
    assert found["images"] == {"num_records": 5, "num_different": 1}
    assert found["prompts"] == {"num_records": 6, "num_different": 6}
    assert "images    1 of 5 were other ones" in said
    assert "prompts   6 of 6 were asked in other words" in said


def test_groups_have_tables_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = pa.schema([*COLUMNS, pa.field("kind", pa.string())])
    kinds = {0: "cat", 1: "cat", 2: "cat", 3: None, 4: None, 5: "\x1b[31mdog"}
    more: dict[str, Any] = {"columns": columns, "more": lambda index: {"kind": kinds[index]}}
    make_run(tmp_path / "a", lambda key: "yes", **more)
    make_run(tmp_path / "b", lambda key: "no" if key.row_index in (1, 3, 4) else "yes", **more)
    found, said = diff(capsys, tmp_path / "a", tmp_path / "b", by=["kind", "year"])
    groups = found["by"]["kind"]["values"]
    assert [group["value"] for group in groups] == ["cat", None, "\x1b[31mdog"]
    assert [group["changes"]["same"] for group in groups] == [2, 0, 1]
    assert [group["num_records"] for group in groups] == [3, 2, 1]
    assert [group["value"] for group in found["by"]["year"]["values"]] == [str(year) for year in range(1900, 1906)]
    assert "null" in said and "\x1b" not in said
    with pytest.raises(UsageError, match=r"has no column 'size'"):
        diff(capsys, tmp_path / "a", tmp_path / "b", by=["size"])
    with pytest.raises(UsageError, match=r"by=image_sha256: the column has the type list"):
        diff(capsys, tmp_path / "a", tmp_path / "b", by=["image_sha256"])


def test_scores_have_an_interval_of_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = pa.schema([*COLUMNS, pa.field("answer", pa.list_(pa.string()))])
    more: dict[str, Any] = {
        "columns": columns,
        "more": lambda index: {"answer": None if index == 39 else ["cat", "tomcat"]},
    }
    make_run(tmp_path / "a", lambda key: "cat" if key.row_index % 2 else "dog", 40, **more)
    make_run(tmp_path / "b", lambda key: "tomcat" if key.row_index > 3 else UNREADABLE, 40, **more)
    asked = {"reference": "answer", "metric": ["exact_match"]}
    found, said = diff(capsys, tmp_path / "a", tmp_path / "b", **asked, by=["prompt_name"])
    score = found["scores"]["exact_match"]
    assert score["num_rows"] == 39
    assert (score["a"], score["b"]) == pytest.approx((19 / 39, 35 / 39))
    assert score["difference"] == pytest.approx(16 / 39)
    assert 0.1 < score["low"] < 16 / 39 < score["high"] < 0.7
    assert "more than chance" in said
    assert found["by"]["prompt_name"]["values"][0]["scores"]["exact_match"] == score
    assert diff(capsys, tmp_path / "a", tmp_path / "b", **asked)[0]["scores"]["exact_match"] == score
    same = diff(capsys, tmp_path / "a", tmp_path / "a", **asked)[0]["scores"]["exact_match"]
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)
    with pytest.raises(UsageError, match="belong together"):
        diff(capsys, tmp_path / "a", tmp_path / "b", reference="answer")
    with pytest.raises(UsageError, match="Did you mean 'exact_match'"):
        diff(capsys, tmp_path / "a", tmp_path / "b", reference="answer", metric=["exactmatch"])


def test_references_may_lie_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: "cat")
    make_run(tmp_path / "b", lambda key: f"dog {key.row_index}" if key.row_index else "cat")
    lines = [{"name": f"{index:05d}.jpg", "gold": [f"dog {index}", "hound"]} for index in range(4)]
    (tmp_path / "gold.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked: dict[str, Any] = {
        "reference": str(tmp_path / "gold.jsonl"),
        "reference_column": "gold",
        "reference_id_column": "name",
        "metric": ["exact_match", "cider"],
    }
    found, said = diff(capsys, tmp_path / "a", tmp_path / "b", **asked, by=["prompt_name"])
    score = found["scores"]["exact_match"]
    assert (score["a"], score["b"], score["num_rows"]) == (0, 0.75, 4)
    assert found["scores"]["cider"]["difference"] > 0
    assert "            cider                    0.0000 -> " in said
    (tmp_path / "gold.jsonl").write_text(json.dumps({"name": "another", "gold": "dog"}))
    with pytest.raises(UsageError, match=r"no record .* has a reference \(reference=.* reference_column=gold\)"):
        diff(capsys, tmp_path / "a", tmp_path / "b", **asked)


def test_what_a_metric_cannot_use_names_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: "maybe")
    with pytest.raises(UsageError, match=r"record '00000.jpg': .*1900"):
        diff(capsys, tmp_path / "a", tmp_path / "a", reference="year", metric=["yes_no"])


def test_a_column_can_stand_for_the_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers against the reference of the same rows: a run is both sides."""
    make_run(tmp_path / "a", lambda key: str(1900 + key.row_index + (key.row_index == 2)))
    found, said = diff(capsys, tmp_path / "a", tmp_path / "a", a_response="year")
    assert found["num_generated_tokens"] is None and "longer in b" not in said, "they are the response's"
    assert (found["changes"]["same"], found["changes"]["changed"]) == (5, 1)
    assert (found["a"]["label"], found["b"]["label"]) == ("year", "response")
    with pytest.raises(UsageError, match="a_response=image_sha256: the column has the type list"):
        diff(capsys, tmp_path / "a", tmp_path / "a", a_response="image_sha256")


def test_changed_records_as_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = ["a dog", UNREADABLE, "a cat", "a cat", "a cat", "a  cat"]
    make_run(tmp_path / "a", lambda key: "a cat", 9)
    make_run(tmp_path / "b", lambda key: b[key.row_index], 6)
    rows = tmp_path / "rows.parquet"
    _, said = diff(capsys, tmp_path / "a", tmp_path / "b", changed_rows=str(rows))
    assert f"rows      {rows}" in said
    table = pq.read_table(rows)
    assert table["key"].to_pylist() == [f"{index:05d}.jpg" for index in (0, 1, 5, 6, 7, 8)]
    assert table["change"].to_pylist() == ["changed", "only_a_answered", "same_normalized", *["only_in_a"] * 3]
    assert table["a_response"].to_pylist() == ["a cat"] * 6
    assert table["b_response"].to_pylist() == ["a dog", None, "a  cat", None, None, None]
    assert table["b_error"].to_pylist()[1] == "decode/UnidentifiedImageError"
    assert table["b_error_message"].to_pylist()[1] == "it is no picture"
    assert table["row_index"].to_pylist() == [0, 1, 5, 6, 7, 8]
    assert table["similarity"].to_pylist() == [pytest.approx(0.4), None, pytest.approx(10 / 11), None, None, None]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_comparison_that_fails_leaves_no_file_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: "a cat")
    make_run(tmp_path / "b", lambda key: "a dog")
    shard = tmp_path / "b/data/part-00001.parquet"
    content = bytearray(shard.read_bytes())
    middle = content.index(b"a dog")
    content[middle : middle + 5] = b"a fox"
    shard.write_bytes(content)
    with pytest.raises(RunFailed, match=r"part-00001.parquet is damaged"):
        diff(capsys, tmp_path / "a", tmp_path / "b", changed_rows=str(tmp_path / "rows.parquet"))
    assert not list(tmp_path.glob("rows*"))


def test_files_go_beside_the_run_b_and_never_into_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: "a cat")
    make_run(tmp_path / "b", lambda key: "a dog")
    before = tree(tmp_path / "a"), tree(tmp_path / "b/data")
    assert run_diff(DiffOptions(a=str(tmp_path / "a"), b=str(tmp_path / "b"))) == 0
    assert (tree(tmp_path / "a"), tree(tmp_path / "b/data")) == before
    assert json.loads((tmp_path / "b/diff.json").read_text())["changes"]["changed"] == 6
    assert "a dog" in (tmp_path / "b/diff.html").read_text().replace("<ins>", "").replace("</ins>", "")


def test_what_was_written_about_a_run_moves_aside_with_it(tmp_path: Path) -> None:
    plan = make_run(tmp_path / "a", lambda key: "a cat")
    assert run_diff(DiffOptions(a=str(tmp_path / "a"), b=str(tmp_path / "a"))) == 0
    old = move_aside(tmp_path / "a", plan.plan_id)
    for name in ("diff.json", "diff.html"):
        assert (old / name).exists() and not (tmp_path / "a" / name).exists()


def test_a_folder_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", lambda key: "a cat")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written: .*Say where it may be: diff_output=FILE"):
        diff(capsys, tmp_path / "a", tmp_path / "a", diff_output=str(tmp_path / "file/diff.json"))


def test_wrong_words_are_named(tmp_path: Path, vlm_batch: CommandLine) -> None:
    make_run(tmp_path / "a", lambda key: "a cat")
    assert "Did you mean 'min_same'" in vlm_batch("diff", "a=a", "b=a", "minsame=1", code=2).stderr
    help_text = vlm_batch("diff", "--help").stdout
    assert "min_same=null" in help_text and "output_dir" not in help_text
    with pytest.raises(UsageError, match="b is not set"):
        run_diff(DiffOptions(a=str(tmp_path / "a")))
    with pytest.raises(UsageError, match="expected the folder of a run, or Parquet"):
        run_diff(DiffOptions(a=str(tmp_path / "a"), b=str(tmp_path / "nothing")))


def test_files_of_others_are_joined_by_what_they_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: f"row {key.row_index}")
    parquet(tmp_path / "b.parquet", id=[f"{index:05d}.jpg" for index in (5, 3, 1)], response=["row 5", "row 9", None])
    found, _ = diff(capsys, tmp_path / "a", tmp_path / "b.parquet")
    assert {name: number for name, number in found["changes"].items() if number} == {
        "same": 1,
        "changed": 1,
        "only_a_answered": 1,
        "only_in_a": 3,
    }
    assert found["num_generated_tokens"] is None
    parquet(tmp_path / "c.parquet", path=["00000.jpg", "00001.jpg"], caption=["row 0", "row 1"])
    with pytest.raises(UsageError, match=r"has no column 'response'; say which holds the answers: b_response=COLUMN"):
        diff(capsys, tmp_path / "a", tmp_path / "c.parquet")
    with pytest.raises(UsageError, match=r"has no column 'id' to join by.*key=COLUMN; its columns are path, caption"):
        diff(capsys, tmp_path / "a", tmp_path / "c.parquet", b_response="caption")
    found, _ = diff(capsys, tmp_path / "a", tmp_path / "c.parquet", b_response="caption", key="path")
    assert (found["changes"]["same"], found["changes"]["only_in_a"]) == (2, 4)


def test_keys_that_stand_twice_or_are_null_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", lambda key: "a cat")
    parquet(tmp_path / "b.parquet", id=["x", "y", "x", "y", "z"], response=["r"] * 5)
    with pytest.raises(UsageError, match=r"b=.*b.parquet: 2 keys stand in more than one record: '[xy]', '[xy]'\. "):
        diff(capsys, tmp_path / "a", tmp_path / "b.parquet")
    parquet(tmp_path / "c.parquet", id=["x", None, None], response=["r"] * 3)
    with pytest.raises(UsageError, match="2 records have no 'id', by which a and b are joined"):
        diff(capsys, tmp_path / "a", tmp_path / "c.parquet")
    parquet(tmp_path / "d.parquet", id=[1.0, 2.0], response=["r"] * 2)
    parquet(tmp_path / "e.parquet", id=[[1], [2]], response=["r"] * 2)
    for name in "de":
        with pytest.raises(UsageError, match=r"key=id: in b it has the type .*; expected text or whole numbers"):
            diff(capsys, tmp_path / "a", tmp_path / f"{name}.parquet", key="id")


def test_keys_twice_in_two_files_are_found_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet(tmp_path / "a/one.parquet", id=["x"], response=["r"])
    parquet(tmp_path / "a/two.parquet", id=["x"], response=["s"])
    with pytest.raises(UsageError, match="1 keys stand in more than one record: 'x'"):
        diff(capsys, tmp_path / "a", tmp_path / "a")


def test_a_column_of_a_run_that_names_rows_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more: dict[str, Any] = {"more": lambda index: {"year": 1900 + index // 2}}
    make_run(tmp_path / "a", lambda key: "a cat", **more)
    with pytest.raises(UsageError, match=r"a=.*: 3 keys stand in more than one record: 190"):
        diff(capsys, tmp_path / "a", tmp_path / "a", key="year")


def test_numbers_and_texts_name_the_same_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet(tmp_path / "a.parquet", id=["1", "2"], response=["r", "s"])
    parquet(tmp_path / "b.parquet", id=[2, 1], response=["s", "r"])
    assert diff(capsys, tmp_path / "a.parquet", tmp_path / "b.parquet")[0]["changes"]["same"] == 2


def test_several_prompts_against_a_file_without_names_of_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", lambda key: key.prompt_name, prompt_names=("x", "y"))
    parquet(tmp_path / "b.parquet", id=[f"{index:05d}.jpg" for index in range(6)], response=["y"] * 6)
    with pytest.raises(UsageError, match=r"a has answers to the prompts x, y, and b does not say .* a_prompt=NAME"):
        diff(capsys, tmp_path / "a", tmp_path / "b.parquet")
    assert diff(capsys, tmp_path / "a", tmp_path / "b.parquet", a_prompt="y")[0]["changes"]["same"] == 6
    with pytest.raises(UsageError, match=r"b_prompt=x: b has no such prompt. It has no column prompt_name"):
        diff(capsys, tmp_path / "a", tmp_path / "b.parquet", b_prompt="x")


def test_files_of_others_may_use_our_names_for_other_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"status": [1, 2], "prompt": [["a"], ["b"]], "image_sha256": [1.5, 2.5], "num_generated_tokens": ["x", "y"]}
    parquet(tmp_path / "a.parquet", id=["x", "y"], response=["r", "s"], **odd)
    assert diff(capsys, tmp_path / "a.parquet", tmp_path / "a.parquet")[0]["changes"]["same"] == 2


def test_a_text_beside_an_error_is_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet(tmp_path / "a.parquet", id=["x", "y", "z"], response=["r"] * 3)
    parquet(tmp_path / "b.parquet", id=["x", "y", "z"], response=["r"] * 3, status=["ok", "error", None])
    found, _ = diff(capsys, tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert (found["changes"]["same"], found["changes"]["only_a_answered"]) == (2, 1)
    assert found["errors"] == [{"a": None, "b": "no answer", "num_records": 1}]
    asked = {"a_response": "id", "reference": "response", "metric": ["exact_match"]}
    score = diff(capsys, tmp_path / "a.parquet", tmp_path / "b.parquet", **asked)[0]["scores"]["exact_match"]
    assert (score["a"], score["b"]) == (0, pytest.approx(2 / 3)), "and scored as none"


def test_a_run_that_was_retried_is_compared_as_it_is_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A retry replaces a shard by one of its next generation, under the same name."""
    make_run(tmp_path / "a", lambda key: "a cat")
    make_run(tmp_path / "b", lambda key: UNREADABLE if key.row_index == 1 else "a cat")
    assert diff(capsys, tmp_path / "a", tmp_path / "b")[0]["changes"]["only_a_answered"] == 1
    make_run(tmp_path / "c", lambda key: "a cat")
    from pipeline.write.shard import shard_summary

    summary = shard_summary(tmp_path / "b/data/part-00000.parquet")
    table = pq.read_table(tmp_path / "c/data/part-00000.parquet")
    assert summary is not None
    pq.write_table(table.replace_schema_metadata(summary.to_metadata()), tmp_path / "b/data/part-00000.parquet")
    assert diff(capsys, tmp_path / "a", tmp_path / "b")[0]["changes"]["same"] == 6


def test_answers_of_100_kilobytes_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(f"word{number}" for number in range(11_000))
    make_run(tmp_path / "a", lambda key: text, 2)
    make_run(tmp_path / "b", lambda key: text[: len(text) // 2] if key.row_index else text + " end", 2)
    found, _ = diff(capsys, tmp_path / "a", tmp_path / "b")
    assert found["changes"]["changed"] == 2
    assert found["similarity"]["lowest"] == pytest.approx(2 / 3, abs=0.01)


def test_no_torch_is_imported(tmp_path: Path) -> None:
    make_run(tmp_path / "a", lambda key: "a cat")
    make_run(tmp_path / "b", lambda key: "a dog")
    script = f"""
import sys
from pipeline.__main__ import main
assert main(["diff", "a={tmp_path}/a", "b={tmp_path}/b"]) == 0
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=CHECKOUT)


def test_without_rapidfuzz_the_extra_is_named(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["rapidfuzz"] = None
from pipeline.__main__ import main
sys.exit(main(["diff", "a=a", "b=b"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=CHECKOUT)
    assert done.returncode == 2
    assert "pip install 'vlm-batch[diff]'" in done.stderr

"""vlm-batch score: runs and files of anybody, held against columns and files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import FAULT, answer, finished_run, keys_of, new_ledger, new_plan, row

from pipeline.__main__ import main
from pipeline.errors import RunFailed, UsageError
from pipeline.score import metrics_named
from pipeline.score.options import ScoreOptions
from pipeline.score.output import write_scores
from pipeline.score.scoring import score
from pipeline.score.table import score_lines

COLUMNS = pa.schema([("path", pa.string()), ("gold", pa.string()), ("kind", pa.string())])


def scored(**words: Any) -> dict[str, Any]:
    """The content of score.json."""
    options = ScoreOptions(**words)
    files = write_scores(score(options), options)
    found: dict[str, Any] = json.loads(Path(str(files[0])).read_text())
    return found


def told(**words: Any) -> str:
    options = ScoreOptions(**words)
    return "\n".join(score_lines(score(options), options, []))


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_with_gold(folder: Path, num_rows: int = 6, **more: Any) -> Path:
    """A run whose odd rows are right by its column `gold`, and whose last row is an error."""
    plan = new_plan(folder, num_rows, columns=COLUMNS, **more)
    ledger = new_ledger(folder, plan, columns=COLUMNS)
    for number in range(plan.num_shards):
        shard = plan.shard(number)
        ledger.open(shard)
        for index in range(shard.start, shard.stop):
            keys = [key for key in keys_of(plan, shard) if key.row_index == index]
            gold = "right" if index % 2 else "wrong"
            ledger.expect(row(index, gold=gold, kind="a" if index < 4 else None), keys, shard)
            for key in keys:
                ledger.record(answer(key, fault=FAULT) if index == num_rows - 1 else answer(key, "right"))
    ledger.close()
    return folder


def test_a_run_against_a_column_of_its_input(tmp_path: Path) -> None:
    run = run_with_gold(tmp_path)
    found = scored(predictions=str(run), reference="gold")["exact_match"]
    assert (found["value"], found["num_rows"], found["num_errors"]) == (pytest.approx(2 / 6), 6, 1)
    assert found["low"] < found["value"] < found["high"]
    rows = pq.read_table(run / "score_rows.parquet").to_pylist()
    assert [entry["exact_match"] for entry in rows] == [0, 1, 0, 1, 0, 0]
    assert rows[1] | {"exact_match": None} == {
        "id": "00001.jpg",
        "row_index": 1,
        "prompt_name": "default",
        "sample_index": 0,
        "exact_match": None,
    }
    assert "errors       1 record without an answer, counted as wrong" in told(predictions=str(run), reference="gold")


def test_groups_are_scored_by_themselves_and_null_is_one(tmp_path: Path) -> None:
    run = run_with_gold(tmp_path)
    words = {"predictions": str(run), "reference": "gold", "by": "kind"}
    groups = scored(**words)["exact_match"]["groups"]
    assert [(entry["group"], entry["value"], entry["num_rows"], entry["num_errors"]) for entry in groups] == [
        ("a", 0.5, 4, 0),
        (None, 0.0, 2, 1),
    ]
    assert "(null)" in told(**words)


def test_each_prompt_and_sample_is_scored_and_the_row_is_drawn_as_a_whole(tmp_path: Path) -> None:
    run = run_with_gold(tmp_path, prompt_names=("p", "q"), num_samples=2)
    found = scored(predictions=str(run), reference="gold", by="prompt_name")["exact_match"]
    assert [(entry["group"], entry["num_rows"]) for entry in found["groups"]] == [("p", 12), ("q", 12)]
    assert (found["num_rows"], found["num_errors"], found["num_repeated"]) == (24, 4, 0)
    alone = run_with_gold(tmp_path / "alone")
    single = scored(predictions=str(alone), reference="gold")["exact_match"]
    assert (found["low"], found["high"]) == (
        single["low"],
        single["high"],
    )  # four alike records are one piece of evidence
    rows = pq.read_table(run / "score_rows.parquet")
    assert rows["prompt_name"].to_pylist()[:4] == ["p", "p", "q", "q"]
    assert rows["sample_index"].to_pylist()[:4] == [0, 1, 0, 1]


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 6, columns=COLUMNS)
    ledger = new_ledger(tmp_path, plan, columns=COLUMNS)
    ledger.open(plan.shard(0))
    for key in keys_of(plan, plan.shard(0)):
        ledger.expect(row(key.row_index, gold="x", kind="y"), [key], plan.shard(0))
        ledger.record(answer(key))
    ledger.close()
    words = {"predictions": str(tmp_path), "reference": "gold"}
    assert "unfinished   3 of 6 records of the run are there" in told(**words)
    found = scored(**words)["exact_match"]
    assert (found["num_records"], found["num_error_records"]) == (3, 0), "by which the report knows old scores"


def test_a_renamed_response_and_an_input_called_response(tmp_path: Path) -> None:
    from pipeline.write.schema import WriteConfig, output_schema

    columns = pa.schema([("path", pa.string()), ("response", pa.string())])
    settings = {"write.response_column": "caption", "write.prefix": ""}
    plan = new_plan(tmp_path, 3, columns=columns, settings=settings)
    schema = output_schema(WriteConfig(response_column="caption"), columns)
    ledger = new_ledger(tmp_path, plan, columns=columns, schema=schema)
    ledger.open(plan.shard(0))
    for key in keys_of(plan, plan.shard(0)):
        ledger.expect(row(key.row_index, response="of the input"), [key], plan.shard(0))
        ledger.record(answer(key, "of the model"))
    ledger.close()
    run = str(tmp_path)
    found = scored(predictions=run, reference="response")["exact_match"]
    assert (found["value"], found["response_column"]) == (0, "caption"), "as the file has it"
    assert scored(predictions=run, reference="caption")["exact_match"]["value"] == 1
    assert scored(predictions=run, reference="response", response_column="caption")["exact_match"]["value"] == 0
    assert scored(predictions=run, reference="response", response_column="response")["exact_match"]["value"] == 1


def test_a_file_of_references_is_joined_by_id(tmp_path: Path) -> None:
    run = run_with_gold(tmp_path / "run")
    gold = lines(
        tmp_path / "gold.jsonl",
        [
            {"image": "00001.jpg", "answers": ["right", "also right"], "kind": "x"},
            {"image": "00002.jpg", "answers": "wrong", "kind": "y"},
            {"image": "00003.jpg", "answers": None},
            {"image": "elsewhere.jpg", "answers": "right"},
        ],
    )
    words = {"predictions": str(run), "reference": gold, "reference_column": "answers", "reference_id_column": "image"}
    found = scored(**words, by="kind")["exact_match"]  # kind is in both: the predictions' is taken
    assert (found["value"], found["num_rows"]) == (0.5, 2)
    assert (found["num_without_reference"], found["num_unused_references"]) == (4, 1)
    assert [entry["group"] for entry in found["groups"]] == ["a"]
    text = told(**words)
    assert "left out     4 records without a reference in the reference file" in text
    assert "not asked    1 of the ids in the reference file, which no record has" in text
    with pytest.raises(UsageError, match=r"id_column=kind: the records of a run go by the ids"):
        scored(**words, id_column="kind")


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".tsv", ".json", ".jsonl"])
def test_every_kind_of_file_may_hold_answers_and_references(ending: str, tmp_path: Path) -> None:
    answers = [{"id": "1", "response": "a, b"}, {"id": "2", "response": None}, {"id": "3", "response": "c"}]
    gold = [{"id": "1", "right": "a, b"}, {"id": "2", "right": "x"}, {"id": "3", "right": "d"}]
    for name, rows in (("answers", answers), ("gold", gold)):
        path = tmp_path / f"{name}{ending}"
        if ending == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif ending in (".csv", ".tsv"):
            sign = "," if ending == ".csv" else "\t"
            cells = [[f'"{value}"' if value else "" for value in entry.values()] for entry in rows]
            path.write_text("\n".join(sign.join(line) for line in [list(rows[0]), *cells]) + "\n")
        else:
            path.write_text(json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows)))
    words = {"reference": str(tmp_path / f"gold{ending}"), "reference_column": "right"}
    found = scored(predictions=str(tmp_path / f"answers{ending}"), **words)["exact_match"]
    assert (found["value"], found["num_rows"], found["num_errors"]) == (pytest.approx(1 / 3), 3, 1)
    assert (tmp_path / "answers.score.json").exists()
    assert not list(tmp_path.glob("*rows*"))


def test_references_that_are_numbers_or_lists(tmp_path: Path) -> None:
    """A whole number that pandas made 5.0, because of a null, is 5; NaN and an empty list are no reference."""
    table = pa.table(
        {
            "response": ["5", "0.1", "true", "7", "1", "b"],
            "number": pa.array([5.0, 0.1, 1.0, math.nan, None, 2.5], pa.float64()),
            "single": pa.array([5.0, 0.1, 1.0, None, None, 2.5], pa.float32()),
            "several": pa.array([["4", "5"], ["0.1"], ["true", None], [], None, ["a", "b"]]),
            "structs": [[{"answer": "5", "answer_id": 1}]] * 5 + [[]],
            "truth": [False, False, True, None, None, None],
        }
    )
    path = tmp_path / "answers.parquet"
    pq.write_table(table, path)
    values = {
        name: (found["value"], found["num_rows"], found["num_without_reference"])
        for name in table.column_names[1:]
        for found in [scored(predictions=str(path), reference=name)["exact_match"]]
    }
    assert values == {
        "number": (0.5, 4, 2),
        "single": (0.5, 4, 2),
        "several": (1, 4, 2),
        "structs": (0.2, 5, 1),
        "truth": (pytest.approx(1 / 3), 3, 3),
    }


def test_records_that_come_twice_are_counted_and_said(tmp_path: Path) -> None:
    answers = lines(tmp_path / "a.jsonl", [{"id": 1, "response": "x", "gold": "x"}] * 2 + [{"id": 2, "gold": "y"}])
    assert scored(predictions=answers, reference="gold")["exact_match"]["num_repeated"] == 1
    assert "repeated     1 record with the id" in told(predictions=answers, reference="gold")


def test_the_answers_of_another_run_may_be_the_reference(tmp_path: Path) -> None:
    a, b = run_with_gold(tmp_path / "a"), tmp_path / "b"
    finished_run(b)
    found = scored(predictions=str(a), reference=str(b), reference_column="response")["exact_match"]
    assert (found["value"], found["num_rows"]) == (0, 6)


def test_multiple_choice_with_options_of_the_row(tmp_path: Path) -> None:
    rows = [
        {"response": "Answer: B", "gold": 1, "options": ["cat", "dog"]},
        {"response": "dog", "gold": "B", "options": "['cat', 'dog']"},
        {"response": "who knows", "gold": "cat", "options": ["cat", "dog"]},
    ]
    answers = lines(tmp_path / "a.jsonl", rows)
    found = scored(predictions=answers, reference="gold", metric=["choice"], options_column="options")["choice"]
    assert (found["value"], found["num_unparsed"], found["num_rows"]) == (pytest.approx(2 / 3), 1, 3)
    with pytest.raises(UsageError, match=r"record '0': choice: the reference '1' is not a letter"):
        score(ScoreOptions(predictions=answers, reference="gold", metric=["choice"]))


def test_parts_of_yes_no_have_intervals(tmp_path: Path) -> None:
    rows = [{"response": said, "gold": right} for said, right in [("yes", "yes"), ("no", "yes"), ("yes", "no")] * 20]
    answers = lines(tmp_path / "a.jsonl", rows)
    found = scored(predictions=answers, reference="gold", metric=["yes_no"])["yes_no"]
    assert found["precision"]["value"] == 0.5
    assert 0.3 < found["precision"]["low"] < 0.5 < found["precision"]["high"] < 0.7
    assert "yes_no recall: 0.5000" in told(predictions=answers, reference="gold", metric=["yes_no"])


def test_what_is_not_defined_is_null_in_json(tmp_path: Path) -> None:
    """NaN is no JSON: a parser of another language would refuse the file."""
    answers = lines(tmp_path / "a.jsonl", [{"response": "no", "gold": "yes"}, {"response": "no", "gold": "no"}])
    found = scored(predictions=answers, reference="gold", metric=["yes_no"])["yes_no"]
    assert found["precision"] == {"value": None, "low": None, "high": None}
    assert "NaN" not in (tmp_path / "a.score.json").read_text()
    assert "yes_no precision: undefined  -" in told(predictions=answers, reference="gold", metric=["yes_no"])


def test_an_empty_answer_is_an_answer(tmp_path: Path) -> None:
    answers = lines(tmp_path / "a.jsonl", [{"response": "", "gold": "x"}, {"response": None, "gold": "x"}])
    assert scored(predictions=answers, reference="gold")["exact_match"]["num_errors"] == 1


def test_cider_learns_from_the_references_of_a_row_once(tmp_path: Path) -> None:
    """Two samples of a row do not make a phrase of its references more common, nor an unknown one rarer."""
    rows = [
        {"id": number, "response": text + " unheard of", "gold": [text]}
        for number, text in enumerate(("a red bus on a road", "a dog near a house", "two red dogs"))
    ]
    once = scored(predictions=lines(tmp_path / "a.jsonl", rows), reference="gold", metric=["cider"])
    twice = [row for row in rows for _ in range(2)]
    again = scored(predictions=lines(tmp_path / "b.jsonl", twice), reference="gold", metric=["cider"])
    assert again["cider"]["value"] == pytest.approx(once["cider"]["value"], abs=1e-12)
    assert once["cider"]["value"] > 1


def test_a_metric_that_is_named_twice_is_scored_once() -> None:
    assert [metric.name for metric in metrics_named(["anls", "bleu", "anls"])] == ["anls", "bleu"]


def test_all_metrics_of_texts_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    words = np.array(["a", "red", "bus", "dog", "near", "house"])
    rows = [
        {"id": number, "response": " ".join(rng.choice(words, 6)), "gold": [" ".join(rng.choice(words, 6))] * 3}
        for number in range(60)
    ]
    names = ["exact_match", "anls", "bleu", "chrf", "rouge_l", "cider", "bleu"]
    words_of_command = {"predictions": lines(tmp_path / "a.jsonl", rows), "reference": "gold", "metric": names}
    found = scored(**words_of_command, score_rows=str(tmp_path / "rows.parquet"))
    assert list(found) == names[:-1]
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in found.values())
    assert found["bleu"]["settings"] == {"signature": "case:mixed|eff:no|tok:13a|smooth:exp"}
    rows_table = pq.read_table(tmp_path / "rows.parquet")
    assert rows_table.column_names == ["id", "row_index", "prompt_name", "sample_index", *names[:-1]]
    assert np.mean(rows_table["cider"].to_numpy()) == pytest.approx(found["cider"]["value"])
    assert scored(**words_of_command) == found


def test_columns_with_our_names_may_hold_anything(tmp_path: Path) -> None:
    odd = {"row_index": "seven", "prompt_name": 3, "sample_index": 0.5, "response": "x", "gold": "x"}
    (tmp_path / "a.json").write_text(
        json.dumps([odd | {"id": "\ud800"}, odd | {"id": None, "row_index": 7, "sample_index": 2**40}])
    )
    rows = tmp_path / "rows.parquet"
    scored(predictions=str(tmp_path / "a.json"), reference="gold", score_rows=str(rows))
    assert [list(entry.values()) for entry in pq.read_table(rows).to_pylist()] == [
        ["?", 0, "3", None, 1.0],
        ["7", 7, "3", None, 1.0],
    ]


@pytest.mark.parametrize("words", [["metric=[anls,chrf]"], ["metric=anls,chrf"], ["metric=anls", "metric=chrf"]])
def test_metrics_may_be_named_in_every_way_of_a_list(words: list[str], tmp_path: Path) -> None:
    answers = lines(tmp_path / "a.jsonl", [{"response": "x", "gold": "x"}])
    assert main(["score", f"predictions={answers}", "reference=gold", *words]) == 0
    assert list(json.loads((tmp_path / "a.score.json").read_text())) == ["anls", "chrf"]


def test_thousands_of_groups(tmp_path: Path) -> None:
    rows = [{"response": "x", "gold": "x", "group": f"\x1b[31m {number}\n" + "w" * 60} for number in range(3000)]
    rows += [{"response": "x", "gold": "y", "group": None}] * 2
    answers = lines(tmp_path / "a.jsonl", rows)
    words = {"predictions": answers, "reference": "gold", "by": "group"}
    groups = scored(**words)["exact_match"]["groups"]
    assert len(groups) == 3001
    assert groups[0] | {"value": 0.0} == groups[0] and groups[0]["group"] is None
    assert (groups[1]["value"], groups[1]["low"]) == (1.0, None)  # one record says nothing about chance
    text = told(**words)
    assert "and 2,981 smaller groups, which are in the JSON file" in text
    assert max(map(len, text.splitlines())) < 160


def test_terminal_output_cannot_be_steered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = lines(tmp_path / "a.jsonl", [{"response": "x", "gold": "x", "group": "\x1b[31m"}])
    assert main(["score", f"predictions={answers}", "reference=gold", "by=group"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b[31m" in shown


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"reference": None}, "reference= is not set"),
        ({"predictions": None}, "predictions= is not set"),
        ({"reference": "gold.jsonl"}, "looks like a file: say with reference_column="),
        ({"reference": "golt"}, r"has no column 'golt'. Did you mean 'gold'\?"),
        ({"response_column": "answer"}, "has no column 'answer'"),
        ({"by": "knd"}, r"has no column 'knd'. Did you mean 'kind'\?"),
        ({"metric": ["exact_macth"]}, "Did you mean 'exact_match'"),
        ({"metric": ["vqa_acuracy"]}, "Did you mean 'vqa_accuracy'"),
        ({"metric": ["vqa_accuracy"]}, "record 'r1': vqa_accuracy: expected the answers of several people"),
        ({"options_column": "kind"}, "options_column=kind is for metric=choice"),
        ({"predictions": "nowhere.jsonl"}, "there is no such file"),
        ({"predictions": "nowhere"}, "expected the folder of a run, or Parquet files"),
        ({"reference": "nothing"}, "no record has a reference in 'nothing'; all are null"),
        ({"response_column": "list"}, "record 'r1', response: expected text or a number, came a list"),
    ],
)
def test_wrong_words_are_refused(
    words: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"id": "r1", "response": "x", "gold": "x", "kind": "k", "nothing": None, "list": ["x"]}
    answers = lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(UsageError, match=problem):
        score(ScoreOptions(**({"predictions": answers, "reference": "gold"} | words)))


@pytest.mark.parametrize(
    ("gold", "problem"),
    [
        ([{"id": 7, "a": "x"}], r"no id is one of the predictions'.*such as '1', '2', the file's such as '7'"),
        ([{"id": 1, "a": "x"}, {"id": 1, "a": "y"}], "the id '1' occurs more than once, with different answers"),
        ([{"id": None, "a": "x"}], r"record 0 \(from 0\) has no id"),
        ([{"key": 1, "a": "x"}], "has no column 'id'"),
        ([], "has no records"),
    ],
)
def test_reference_files_that_cannot_be_joined_are_refused(
    gold: list[dict[str, Any]], problem: str, tmp_path: Path
) -> None:
    answers = lines(tmp_path / "a.jsonl", [{"id": 1, "response": "x"}, {"id": 2, "response": "x"}])
    file = lines(tmp_path / "gold.jsonl", gold)
    with pytest.raises(UsageError, match=problem):
        score(ScoreOptions(predictions=answers, reference=file, reference_column="a"))


def test_predictions_without_ids_cannot_be_joined(tmp_path: Path) -> None:
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "response": "x"}])
    file = lines(tmp_path / "gold.jsonl", [{"id": 1, "a": "x"}])
    words = {"predictions": answers, "reference": file, "reference_column": "a"}
    with pytest.raises(UsageError, match="has no column 'id'"):
        score(ScoreOptions(**words))
    assert score(ScoreOptions(**words, id_column="question_id")).overall[0].interval.value == 1


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"response": "x", "gold": "x"}\n{"resp', r"a\.jsonl:2 does not parse"),
        ("a.json", '{"response": "x"}', "expected a list of objects"),
        ("a.json", "[1]", "expected a list of objects"),
        ("a.json", "[", "cannot be read as JSON"),
        ("a.csv", "response,response\n", "has no CSV header"),
        ("a.csv", "response,gold\nx\n", r"a\.csv:2 does not parse: expected 2 fields, found 1"),
        ("a.parquet", "no parquet", "cannot be read as Parquet"),
    ],
)
def test_damaged_files_are_named(name: str, content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises((UsageError, RunFailed), match=problem):
        score(ScoreOptions(predictions=str(tmp_path / name), reference="gold"))


def test_where_scores_go(tmp_path: Path) -> None:
    run = run_with_gold(tmp_path / "run")
    elsewhere = tmp_path / "new" / "mine.json"
    scored(predictions=str(run), reference="gold", score_output=str(elsewhere))
    assert sorted(path.name for path in elsewhere.parent.iterdir()) == ["mine.json", "mine_rows.parquet"]
    assert not list(run.glob("score*"))
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(RunFailed, match=r"dir\.json cannot be written"):
        scored(predictions=str(run), reference="gold", score_output=str(tmp_path / "dir.json"))
    pq.write_table(pa.table({"response": ["x"], "gold": ["x"]}), tmp_path / "part.parquet")
    with pytest.raises(UsageError, match="score_output= is not set"):
        scored(predictions=f"{tmp_path}/*.parquet", reference="gold")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    answers = lines(tmp_path / "a.jsonl", [{"response": "x", "gold": "x"}])
    script = """
import sys
sys.modules["rapidfuzz"] = sys.modules["sacrebleu"] = None
from pipeline.__main__ import main
for metric, code in (("exact_match", 0), ("chrf", 0), ("cider", 0), ("anls", 2), ("rouge_l", 2), ("bleu", 2)):
    assert main(["score", "predictions=a.jsonl", "reference=gold", f"metric={metric}"]) == code, metric
assert not {"torch", "transformers", "datasets", "pandas"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(answers).parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "needs the package rapidfuzz, which is not installed: pip install 'vlm-batch[score]'" in done.stderr
    assert "needs the package sacrebleu" in done.stderr


def test_reading_changes_nothing_of_a_run(tmp_path: Path) -> None:
    run = run_with_gold(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    scored(predictions=str(run), reference="gold")
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"score.json", "score_rows.parquet"}
    assert all(after[path] == content for path, content in before.items())

"""Constrained answers from the command line: their columns, what is refused, and a run with them is a run as any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from command_line import CommandLine, wait_for_journal

from pipeline.compose import compose
from pipeline.config import answer_settings
from pipeline.dataset.demo import DEMO_FILE
from pipeline.results import results_of_run

DIGIT = ["generation.choices=[0,1,2,3,4,5,6,7,8,9]"]
SCHEMA = {
    "type": "object",
    "properties": {
        "digits": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 4}
    },
    "required": ["digits"],
}


def source(folder: Path, *tasks: str, count: int = 60) -> list[str]:
    """Questions of the demo of some kinds, as a file; the words that read it."""
    table = pq.read_table(DEMO_FILE)
    table = table.filter(pc.is_in(table["task"], pa.array(tasks))).slice(0, count)
    options = [["yes", "no"] if task == "same_number" else list("0123456789") for task in table["task"].to_pylist()]
    caps = [8 if number % 4 == 3 else 40 for number in range(len(table))]
    table = table.append_column("options", pa.array(options)).append_column("cap", pa.array(caps))
    pq.write_table(table, folder / "questions.parquet")
    return [
        "dataset=parquet",
        "dataset.path=questions.parquet",
        "dataset.image_column=images",
        "dataset.id_column=id",
        "prompt.user={{question}}",
    ]


def answers(output_dir: Path) -> pa.Table:
    return pq.read_table(output_dir / "data")


@pytest.mark.slow
def test_choices_keep_or_raise_accuracy_and_cost_a_token(vlm_batch: CommandLine, tmp_path: Path) -> None:
    words = source(tmp_path, "first", "last", "largest", "count")
    vlm_batch("run", *words, "output_dir=free")
    vlm_batch("run", *words, "output_dir=chosen", *DIGIT)
    free, chosen = answers(tmp_path / "free"), answers(tmp_path / "chosen")
    assert "parse_ok" not in free.schema.names and "response_json" not in free.schema.names
    place = chosen.schema.names.index("response")
    assert chosen.schema.names[place : place + 3] == ["response", "response_json", "parse_ok"]
    right = [
        sum(map(str.__eq__, *(table[name].to_pylist() for name in ("response", "answer")))) for table in (free, chosen)
    ]
    assert right[1] >= right[0] >= 54
    assert set(chosen["response"].to_pylist()) <= set("0123456789")
    assert chosen["response_json"].to_pylist() == [json.dumps(text) for text in chosen["response"].to_pylist()]
    assert pc.all(chosen["parse_ok"]).as_py()
    assert pc.max(chosen["num_generated_tokens"]).as_py() == 1 < pc.min(free["num_generated_tokens"]).as_py()
    assert "passed" in vlm_batch("audit", "output_dir=chosen").stdout
    assert "passed" in vlm_batch("audit", "output_dir=free").stdout
    results = results_of_run(tmp_path / "chosen")
    assert results.names["parse_ok"] == "parse_ok" and "response_json" not in results.input_columns


@pytest.mark.slow
def test_a_file_with_a_schema_is_read_once_and_its_content_is_in_the_plan(
    vlm_batch: CommandLine, tmp_path: Path
) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA, indent=2))
    words = [*source(tmp_path, "read", count=24), "write.prefix=vlm_", "write.shard_rows=10"]
    words += ["generation.max_new_tokens=40", "generation.max_new_tokens_column=cap"]
    vlm_batch("run", *words, "output_dir=out", "generation.json_schema=schema.json")
    rows = answers(tmp_path / "out").to_pylist()
    for row in rows:
        assert row["vlm_parse_ok"] is (row["cap"] == 40)
        assert row["vlm_finish_reason"] == ("stop" if row["cap"] == 40 else "length")
        if row["cap"] < 40:
            assert row["vlm_response_json"] is None and row["vlm_response"].startswith('{"digits"')
            continue
        found = json.loads(row["vlm_response"])
        assert list(found) == ["digits"] and set(found["digits"]) <= set(range(10))
        assert row["vlm_response_json"] == json.dumps(found, separators=(",", ":"))
    # The same content from elsewhere goes on; other content is refused.
    moved = tmp_path / "elsewhere.json"
    path.rename(moved)
    vlm_batch("run", *words, "output_dir=out", "generation.json_schema=elsewhere.json")
    moved.write_text(json.dumps(SCHEMA | {"title": "other"}))
    refused = vlm_batch("run", *words, "output_dir=out", "generation.json_schema=elsewhere.json", code=2)
    assert "generation.json_schema" in refused.stderr and "other settings" in refused.stderr


def with_errors(tmp_path: Path) -> list[str]:
    """A run in which two rows have no choices to choose from."""
    words = [*source(tmp_path, "same_number", "first", count=20), "generation.choices_column=options", "output_dir=out"]
    table = pq.read_table(tmp_path / "questions.parquet")
    options = table["options"].to_pylist()
    broken = [["a", "a"] if row == 3 else None if row == 5 else kept for row, kept in enumerate(options)]
    place = table.schema.names.index("options")
    pq.write_table(table.set_column(place, "options", pa.array(broken)), tmp_path / "questions.parquet")
    return [*words, "max_error_rate=null"]


def test_a_run_with_choices_of_each_row(vlm_batch: CommandLine, tmp_path: Path) -> None:
    vlm_batch("run", *with_errors(tmp_path))
    first = answers(tmp_path / "out")
    errors = first.filter(pc.equal(first["status"], "error"))
    assert errors["row_index"].to_pylist() == [3, 5]
    assert errors["error_type"].to_pylist() == ["Choices", "Choices"]
    assert "options is ['a', 'a']: a text stands there twice" in errors["error_message"].to_pylist()
    assert errors["parse_ok"].to_pylist() == errors["response_json"].to_pylist() == [None, None]
    kept = first.filter(pc.equal(first["status"], "ok")).to_pylist()
    assert len(kept) == 18 and all(row["response"] in row["options"] and row["parse_ok"] for row in kept)
    assert all(row["response_json"] == json.dumps(row["response"]) for row in kept)
    assert "passed" in vlm_batch("audit", "output_dir=out").stdout


@pytest.mark.slow
def test_error_rows_of_a_constrained_run_are_asked_again(vlm_batch: CommandLine, tmp_path: Path) -> None:
    words = with_errors(tmp_path)
    vlm_batch("run", *words)
    first = answers(tmp_path / "out")
    kept = first.filter(pc.equal(first["status"], "ok")).to_pylist()
    vlm_batch("retry", *words)
    again = answers(tmp_path / "out")
    assert again.schema.equals(first.schema)
    assert again.filter(pc.equal(again["status"], "ok")).to_pylist() == kept
    assert again.filter(pc.equal(again["status"], "error"))["attempt"].to_pylist() == [2, 2]
    assert "passed" in vlm_batch("audit", "output_dir=out").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generation.regex=(a"], "generation.regex=(a cannot be compiled: unclosed group"),
        (["generation.choices_column=nothing"], "generation.choices_column=nothing: there is no such column"),
        (["generation.choices=[a,b]", "generation.extra.num_beams=3"], "num_beams=3"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    words: list[str], said: str, vlm_batch: CommandLine, tmp_path: Path
) -> None:
    refused = vlm_batch("run", "output_dir=out", *words, code=2)
    assert said in refused.stderr
    assert "loading the model" not in refused.stderr and not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.slow
def test_a_preview_says_what_it_parsed(vlm_batch: CommandLine, tmp_path: Path) -> None:
    shown = vlm_batch("preview", *source(tmp_path, "first", count=2), "rows=[0]", *DIGIT).stdout
    (parsed,) = [line for line in shown.splitlines() if line.startswith("parsed")]
    assert json.loads(parsed.split(maxsplit=1)[1]) in list("0123456789")


def test_texts_of_a_list_stay_as_they_are_written() -> None:
    given = compose(
        ['generation.choices=[true,No,2.50,-1,007,"a, true, b",1e5]', "generation.stop=[1.0]"]
    ).config.generation
    assert given.choices == ["true", "No", "2.50", "-1", "007", "a, true, b", "1e5"]
    assert given.stop == ["1.0"]


def test_settings_without_a_constraint_are_those_of_older_plans() -> None:
    settings = answer_settings(compose([]).config)
    assert all(settings[f"generation.{name}"] is None for name in ("json_schema", "regex", "choices", "choices_column"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_to_the_same_bytes(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Fault 1, with masks: SIGKILL twice, and the result is that of an unbroken run."""
    words = source(tmp_path, "read", "detail", "describe", count=200)
    job = ["run", *words, f"generation.json_schema={json.dumps(SCHEMA)}", "generation=sample", "generation.n=2"]
    job += ["write.shard_rows=50", "write.sync_seconds=0.1", "engine.max_batch_rows=3"]
    for _ in range(2):
        command = [sys.executable, "-m", "pipeline", *job, "output_dir=killed"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_journal(tmp_path / "killed", process)
        process.kill()
        process.wait()
    vlm_batch(*job, "output_dir=killed")
    vlm_batch(*job, "output_dir=unbroken", "engine=static", "engine.max_batch_rows=16")
    killed, unbroken = (answers(tmp_path / name).drop_columns(["run_id"]) for name in ("killed", "unbroken"))
    assert killed.equals(unbroken)
    assert "passed" in vlm_batch("audit", "output_dir=killed").stdout

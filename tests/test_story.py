"""The program as its user meets it: one job from an empty folder to a dataset that is right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import duckdb
import pyarrow.parquet as pq
import pytest
from command_line import CommandLine, wait_for_journal
from PIL import Image

from pipeline.status import phases


def records(output_dir: Path) -> list[dict[str, object]]:
    return pq.read_table(output_dir / "data").to_pylist()


def test_a_job_from_an_empty_folder_to_right_answers(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """The embedded default answers real pictures right; a second start has nothing to do and loads no model."""
    first = vlm_batch("run", "dataset.max_rows=300", "write.shard_rows=100", "output_dir=answers", "report=true")
    assert "300 of 300 done" in first.stdout
    rows = records(tmp_path / "answers")
    assert [row["row_index"] for row in rows] == list(range(300))
    right = sum(row["response"] == row["answer"] for row in rows)
    assert right / len(rows) >= 0.95
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert all(row["num_generated_tokens"] and row["num_image_tokens"] for row in rows)
    [parity] = json.loads((tmp_path / "answers" / "manifest.json").read_text())["parity"]
    assert (parity["num_rows"], parity["num_identical"], parity["num_pictures_changed"]) == (8, 8, 3)
    assert parity["logit_error"] <= 1e-5
    [worker] = [json.loads(path.read_text()) for path in (tmp_path / "answers" / "stats").iterdir()]
    shares = phases([worker])
    assert all(shares[name] > 0.01 for name in ("trial", "vision", "prefill", "decode"))
    assert 0 < shares["writing"] < 0.2 and 0 <= shares["other"] < 0.3
    assert sum(shares.values()) == pytest.approx(1)
    assert "time     waiting for input" in first.stdout

    before = {path: path.read_bytes() for path in (tmp_path / "answers" / "data").iterdir()}
    second = vlm_batch("run", "dataset.max_rows=300", "write.shard_rows=100", "output_dir=answers")
    assert "All 300 rows are done already; no model was loaded." in second.stdout
    assert before == {path: path.read_bytes() for path in (tmp_path / "answers" / "data").iterdir()}

    assert "none missing, none doubled" in vlm_batch("audit", "output_dir=answers").stdout
    assert "state    done" in vlm_batch("status", "output_dir=answers", "watch=true").stdout
    assert sorted(path.name for path in (tmp_path / "answers").iterdir()) == [
        "README.md", "data", "manifest.json", "plan", "plan.json", "report.html", "stats",
    ]  # fmt: skip


def test_the_result_loads_where_people_load_it(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """datasets, pandas and DuckDB read data/*.parquet as it is."""
    vlm_batch("run", "dataset.max_rows=20", "output_dir=answers")
    pattern = str(tmp_path / "answers" / "data" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 20 and isinstance(loaded[0]["response"], str)
    assert duckdb.sql(f"select count(*) from '{pattern}' where status = 'ok'").fetchall() == [(20,)]


def test_a_folder_with_a_broken_image_gives_its_neighbours_the_same_answers(
    vlm_batch: CommandLine, tmp_path: Path
) -> None:
    """Fault 38: one corrupt file beside good ones, with a real model: one error row, and nobody else notices."""
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    for number in range(6):
        image = Image.new("RGB", (40 + number, 30), (40 * number, 90, 200))
        image.save(pictures / ("deep" if number % 2 else ".") / f"img{number}.png")
    job = ["run", "dataset=images", f"dataset.path={pictures}", "prompt=describe", "generation.max_new_tokens=8"]
    vlm_batch(*job, "output_dir=clean")
    (pictures / "img3b.png").write_bytes(b"not a picture")
    (pictures / "deep" / "cut.jpg").write_bytes((pictures / "img0.png").read_bytes()[:60])
    vlm_batch(*job, "output_dir=mixed", "write.keep_images=true")
    clean = {row["id"]: row["response"] for row in records(tmp_path / "clean")}
    mixed = {row["id"]: row for row in records(tmp_path / "mixed")}
    assert {name: mixed[name]["response"] for name in clean} == clean
    assert all(row["image"][0]["bytes"] == (pictures / name).read_bytes() for name, row in mixed.items())
    for name in ("img3b.png", "deep/cut.jpg"):
        assert (mixed[name]["status"], mixed[name]["error_stage"], mixed[name]["response"]) == ("error", "decode", None)


def test_several_prompts_about_one_image_stand_beside_each_other(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """K named prompts give K records of a row, in the order in which they were named."""
    vlm_batch(
        "run", "dataset.max_rows=5", "output_dir=answers",
        "prompt.variants={first: What is the first digit?, last: What is the last digit?}",
    )  # fmt: skip
    rows = records(tmp_path / "answers")
    assert [(row["row_index"], row["prompt_name"]) for row in rows] == [
        (index, name) for index in range(5) for name in ("first", "last")
    ]
    assert rows[0]["prompt"] == "What is the first digit?"


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGUSR1, signal.SIGINT))],
)
def test_a_signal_ends_the_run_in_good_order(number: signal.Signals, vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Fault 7: exit code 75, even if the signal comes twice; the next start goes on and asks for no answer again."""
    job = ["run", "engine.max_batch_rows=2", "dataset.max_rows=300", "write.sync_seconds=0.2", "output_dir=answers"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *job],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_journal(tmp_path / "answers", process)
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Run the same command again" in said
    status = vlm_batch("status", "output_dir=answers").stdout
    assert "not running" in status
    num_kept = int(status.split("rows")[1].split("of")[0].replace(",", ""))
    assert 0 < num_kept < 300
    vlm_batch(*job)
    worker = max(
        (json.loads(path.read_text()) for path in (tmp_path / "answers" / "stats").iterdir()),
        key=lambda worker: worker["started"],
    )
    assert worker["num_answered"] == 300 - num_kept
    vlm_batch("audit", "output_dir=answers")


def listens(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGTERM: the mask of caught signals, in hexadecimal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("seconds", [0.1, 1.5, 3.0])
def test_a_signal_before_the_first_answer_asks_for_another_start(seconds: float, tmp_path: Path) -> None:
    """Fault 7: sent to the whole process group while models and libraries load, as a terminal and Slurm do: code 75."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "output_dir=answers"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not listens(process.pid):
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "stopping" in said
    assert "Traceback" not in said


def test_a_run_in_which_every_row_failed_is_a_failed_run(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Fault 37: few rows that all fail: exit code 1, and the records are there all the same."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"not a picture")
    job = ["run", "dataset=images", "dataset.path=pictures", "prompt=describe", "output_dir=answers"]
    assert "failed   every row" in vlm_batch(*job, code=1).stdout
    assert [row["status"] for row in records(tmp_path / "answers")] == ["error"]
    vlm_batch(*job, "max_error_rate=null")


@pytest.mark.slow
def test_a_run_that_is_broken_as_a_whole_stops_and_says_why(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Fault 37: over the error budget: exit code 1 and the commonest error; a raised budget goes on."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(300):
        (pictures / f"{number}.jpg").write_bytes(b"\xff\xd8 no picture")
    job = ["run", "dataset=images", f"dataset.path={pictures}", "prompt=describe", "output_dir=answers"]
    failed = vlm_batch(*job, code=1)
    assert "max_error_rate=0.05" in failed.stderr and "decode/" in failed.stderr
    vlm_batch(*job, "max_error_rate=null")
    assert {row["status"] for row in records(tmp_path / "answers")} == {"error"}


def test_what_is_wrong_is_said_before_a_model_loads(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Wrong words, keys, templates, folders: the right exit code, a sentence with the remedy, and nothing written."""
    cases = [
        (["run", "dataset.max_row=3"], 2, "Did you mean 'dataset.max_rows'"),
        (["run", "datset=images"], 2, "Did you mean 'dataset'"),
        (["run", "dataset=image"], 2, "Did you mean 'images'"),
        (["runn"], 2, "Did you mean 'run'"),
        (["run", "dataset.max_rows=many"], 2, "dataset.max_rows"),
        (["run", "engine.max_batch_rows=0"], 2, "engine.max_batch_rows=0: expected at least 1"),
        (["run", "max_error_rate=5"], 2, "max_error_rate=5.0: expected at most 1"),
        (["run", "prompt.user={{ qestion }}"], 2, "question"),
        (["run", "prompt.user={{ question"], 2, "prompt.user"),
        (["run", "dataset=images", "dataset.path=nowhere"], 2, "nowhere"),
        (["run", "dataset=images"], 2, "dataset.path is not set"),
        (["run", "vlm=auto", "vlm.path=./no-model"], 2, "no-model"),
        (["run", "engine=slots", "+generation.extra.no_repeat_ngram_size=3"], 2, "engine=auto takes padded batches"),
        (["status", "output_dir=nothing"], 2, "holds no run"),
        (["run", "-m", "seed=1,2"], 2, "Multirun"),
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ended = list(pool.map(lambda case: vlm_batch(*case[0], code=case[1]), cases))
    for (words, _, sentence), done in zip(cases, ended, strict=True):
        assert sentence in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_found_before_a_model_loads(
    vlm_batch: CommandLine, tmp_path: Path
) -> None:
    """Fault 19: a file where the output folder should be is named before a model loads, and stays as it is."""
    (tmp_path / "taken").write_text("mine")
    done = vlm_batch("run", "output_dir=taken", code=1)
    assert "taken" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "taken").read_text() == "mine"


def test_changed_settings_are_refused_with_a_difference(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Fault 26: what changes answers may not change within a folder; what changes only speed may."""
    vlm_batch("run", "dataset.max_rows=10", "output_dir=answers")
    before = {path: path.read_bytes() for path in (tmp_path / "answers").rglob("*") if path.is_file()}
    done = vlm_batch("run", "dataset.max_rows=10", "output_dir=answers", "prompt.system=Be brief.", code=2)
    assert "prompt.system" in done.stderr and "was null" in done.stderr and '"Be brief."' in done.stderr
    assert before == {path: path.read_bytes() for path in (tmp_path / "answers").rglob("*") if path.is_file()}
    vlm_batch("run", "dataset.max_rows=10", "output_dir=answers", "engine.max_batch_rows=3", "engine.num_workers=2")


def test_light_commands_never_import_torch(tmp_path: Path) -> None:
    """--help, status and audit answer at once."""
    program = (
        "import sys\nfrom pipeline.__main__ import main\ncode = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy imports'\nsys.exit(code)"
    )
    for words, code in ((["--help"], 0), (["run", "--help"], 0), (["status", "output_dir=none"], 2)):
        done = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "heavy imports" not in done.stderr


def test_a_reader_that_stops_listening_is_no_traceback(tmp_path: Path) -> None:
    """vlm-batch run --help | head -1"""
    done = subprocess.run(
        f"{sys.executable} -m pipeline run --help | head -1", shell=True, cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr

"""vlm-batch plan as its user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import CHECKOUT, CommandLine
from PIL import Image
from small_run import new_ledger, tree, work

from pipeline.compose import compose, taken
from pipeline.errors import UsageError
from pipeline.forecast.figures import figures
from pipeline.forecast.forecast import Forecast, forecast
from pipeline.forecast.foreseen import foreseen
from pipeline.forecast.lines import forecast_lines
from pipeline.forecast.options import PlanOptions
from pipeline.run import begun


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Loading the demo model sets torch's threads; other tests shall not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def forecast_of(*words: str) -> Forecast:
    options, settings = taken(words, PlanOptions)
    return forecast(compose(settings).config, options)


def pictures(folder: Path, num_good: int, *bad: str) -> Path:
    folder.mkdir()
    for number in range(num_good):
        Image.new("RGB", (40 + number, 30), (number, 90, 200)).save(folder / f"{number:03d}.png")
    for name in bad:
        (folder / name).write_bytes(b"no picture")
    return folder


def test_the_table_says_first_what_it_costs_then_what_limits_then_what_is_wrong(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 27, "broken.png", "empty.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    os.mkfifo(folder / "pipe.png")
    before = tree(tmp_path)
    found = forecast_of(
        "dataset=images", f"dataset.path={folder}", f"output_dir={tmp_path / 'out'}", "price_per_hour=3",
        "generation.max_new_tokens=6",
    )  # fmt: skip
    lines = list(forecast_lines(found))
    labels = [line[:8].strip() for line in lines if line[:8].strip()]
    order = ("job", "time", "hours", "price", "disk", "speed", "limit", "phases", "input", "rows", "bad", "images",
             "prompts", "answers", "note")  # fmt: skip
    assert list(dict.fromkeys(labels)) == list(order)
    text = "\n".join(lines)
    assert "10.0% of the rows will be error rows" in text, "all rows were seen: no interval"
    assert "x decode/UnidentifiedImageError, as broken.png: " in text and "as empty.jpg" in text and "pipe.png" in text
    assert "30 looked at, spread over 30" in text
    assert "max_error_rate" not in text, "of which no run stops that is so short"
    assert found.warm is not None and found.warm.num_rows == len(found.warm.indices) == 30, (
        "bad rows cost themselves alone"
    )
    assert len(found.warm.lengths) == 27
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_json_has_every_figure_and_they_agree(vlm_batch: CommandLine, tmp_path: Path) -> None:
    done = vlm_batch("plan", "json=true", "sample_rows=24", "price_per_hour=2", "output_dir=out")
    assert not list(tmp_path.iterdir()), "nothing is written"
    found = json.loads(done.stdout)
    taken, hours, price = found["time"]["seconds"], found["time"]["accelerator_hours"], found["price"]
    assert taken["low"] < taken["value"] < taken["high"]
    for name in ("value", "low", "high"):
        assert hours[name] == pytest.approx(taken[name] / 3600)
        assert price[name] == pytest.approx(2 * hours[name])
    parts = found["time"]["start_seconds"] + sum(found["time"]["phase_seconds"].values())
    assert taken["value"] == pytest.approx(parts)
    assert (found["num_rows"], found["num_records_left"], found["num_shards"]) == (1210, 1210, 2)
    assert found["data"]["num_rows_seen"] == found["answers"]["num_rows_answered"] == 24
    assert found["data"]["num_prompt_tokens"]["min"] > found["data"]["num_image_tokens"]["min"] > 0
    assert found["answers"]["engine"] == "slots" and found["answers"]["rows_at_a_time"] == 64
    assert found["disk"]["has_answers"] and found["disk"]["data_bytes"] > 10_000


def test_prompts_samples_and_caps_of_rows_are_counted(tmp_path: Path) -> None:
    """A text-only source, two prompts, two samples; with ignore_eos every answer is as long as its row's cap."""
    rows = [{"word": f"word {number}", "cap": 2 + number % 5} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = forecast_of(
        "dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}", "dataset.image_column=null",
        f"output_dir={tmp_path / 'out'}", "generation=sample", "generation.n=2", "generation.ignore_eos=true",
        "generation.max_new_tokens_column=cap", "prompt.variants={a: 'Say {{ word }}.', b: 'What is {{ word }}?'}",
        "write.shard_rows=8",
    )  # fmt: skip
    assert (found.found.plan.num_records, found.found.plan.num_shards) == (80, 3)
    values = figures(found)
    assert values["answers"]["mean_num_generated_tokens"] == {"value": 4.0, "low": 4.0, "high": 4.0}
    assert values["answers"]["length_share"] == 1.0
    assert values["data"]["image_width"] == {}
    assert "20 rows x 2 prompts x 2 samples = 80 answers in 3 shards" in "\n".join(forecast_lines(found))


def test_the_data_alone_needs_neither_torch_nor_a_model(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 5, "broken.png")
    script = """
import sys
from pipeline.__main__ import main
assert main(sys.argv[1:]) == 0
assert not {"torch", "transformers", "datasets"} & set(sys.modules), "imported"
"""
    words = ["plan", "model=false", "dataset=images", f"dataset.path={folder}", "vlm=auto", "vlm.path=no/model",
             f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=CHECKOUT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "time and price need the model: model=true" in done.stdout
    assert "16.7% of the rows will be error rows" in done.stdout
    assert "40 x 30 to 44 x 30 pixels" in done.stdout
    assert not (tmp_path / "out").exists()


def test_tokens_are_counted_without_weights_and_long_prompts_found(tmp_path: Path) -> None:
    rows = [{"text": "word " * (4000 if number % 4 == 0 else 3)} for number in range(240)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = forecast_of(
        "model=false", "tokens=true", "dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}",
        "dataset.image_column=null", "prompt.user={{ text }}", f"output_dir={tmp_path / 'out'}",
        "sample_rows=1000",
    )  # fmt: skip
    assert found.warm is None and found.survey is not None
    assert found.survey.num_too_long == 60
    text = "\n".join(forecast_lines(found))
    assert "60 of 240 rows have a prompt longer than the model's context" in text
    assert "60 x encode/PromptTooLong, as " in text and "           and encode/PromptTooLong, as " in text
    assert "the run would stop: more error rows than max_error_rate=0.05" in text
    assert "\nprompts  " in text


def test_a_finished_run_has_nothing_left_and_loads_no_model(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 4)
    words = ["dataset=images", f"dataset.path={folder}", f"output_dir={tmp_path / 'out'}"]
    config = compose(words).config
    plan = begun(config, None)[1]
    ledger = new_ledger(tmp_path / "out", plan, schema=foreseen(config, None).schema)
    work(ledger, plan, plan.shard(0))
    ledger.close()
    before = tree(tmp_path)
    found = forecast_of(*words)
    assert list(forecast_lines(found)) == [
        "job      4 rows in 1 shard; 4 are done (100%), 0 are left",
        "time     nothing is left to do",
    ]
    assert figures(found)["time"] is None and figures(found)["num_records_left"] == 0
    assert tree(tmp_path) == before


def test_names_of_rows_cannot_steer_a_terminal(vlm_batch: CommandLine, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 1, "a\x1b[31m\nprice    0.png")
    done = vlm_batch("plan", "model=false", "dataset=images", f"dataset.path={folder}", "output_dir=out")
    assert "\x1b" not in done.stdout + done.stderr
    assert "\nprice    0" not in done.stdout
    assert "\\x1b[31m\\nprice" in done.stdout


@pytest.mark.slow
def test_an_interrupted_plan_ends_with_75_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "plan", f"output_dir={tmp_path / 'out'}"]
    with subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as planning:
        assert planning.stderr is not None
        for line in planning.stderr:
            if "looked at" in line:
                break
        planning.send_signal(signal.SIGINT)
        out, errors = planning.communicate(timeout=120)
    assert planning.returncode == 75, errors
    assert "Stopped; nothing was written." in errors and not out
    deadline = time.monotonic() + 30
    while True:
        try:
            os.killpg(planning.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "a process of it is left"
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())


def test_words_that_contradict_each_other_are_refused(vlm_batch: CommandLine) -> None:
    assert "tokens=false and model=true" in vlm_batch("plan", "tokens=false", code=2).stderr
    assert "sample_rows=0: expected at least 1" in vlm_batch("plan", "sample_rows=0", code=2).stderr
    with pytest.raises(UsageError, match="there is no key 'sample_row'"):
        forecast_of("sample_row=3")

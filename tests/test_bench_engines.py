"""The engine benchmark: every side does the same work, and what is counted is counted right."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPTS = CHECKOUT / "scripts"
pytest.importorskip("psutil", reason="the benchmark watches processes with psutil (extra dev)")


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    torch.set_num_threads(1)


def run(**changes: Any) -> Any:
    """A side's run: 4 rows of 10 tokens in 2 slots."""
    from bench_sides import Measured

    engine = {"num_decode_steps": 20, "num_decode_rows": 40, "num_prompt_tokens": 30, "num_padded_prompt_tokens": 40}
    whole = Measured(4, 40, 12.0, 2.0, 0.5, 3.0, 2**20, 1.0, engine=engine, phases={"waiting_for_input": 0.5})
    return replace(whole, **changes)


def line(*runs: Any, name: str = "ours: slots, 16", **changes: Any) -> Any:
    from bench_table import Line

    values: dict[str, Any] = {"absent": None, "num_slots": 2, "num_requests": 8, "bound": None} | changes
    return Line(name, runs, **values)


def test_answers_have_the_mean_length_and_the_cap_of_the_workload() -> None:
    from bench_lengths import WORKLOADS, lengths

    for load in WORKLOADS.values():
        found = lengths(load)
        assert len(found) == load.num_pictures
        assert statistics.mean(found) == pytest.approx(load.mean_tokens, rel=0.02)
        assert max(found) <= load.cap_tokens
        assert max(found) > 2 * load.mean_tokens  # a static batch has something to wait for
        assert found == lengths(load) != sorted(found)


def test_requests_about_one_picture_share_it_and_the_length_of_the_answer(tmp_path: Path) -> None:
    from bench_lengths import QUICK
    from bench_requests import write_by_picture, write_requests

    write_requests(tmp_path / "rows.parquet", QUICK["questions"], 512)
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert len(rows) == len({row["id"] for row in rows}) == 16
    assert len({row["images"][0]["bytes"] for row in rows}) == 2
    assert len({row["question"] for row in rows}) == 16
    assert len({(row["images"][0]["bytes"], row["max_new_tokens"]) for row in rows}) == 2
    write_by_picture(tmp_path / "rows.parquet", tmp_path / "pictures.parquet", 8)
    first = pq.read_table(tmp_path / "pictures.parquet").to_pylist()[1]
    assert [first[f"question_{number}"] for number in range(8)] == [row["question"] for row in rows[8:]]


def test_one_picture_in_twenty_is_large() -> None:
    from bench_requests import sizes

    assert len(sizes()) == 20
    assert sizes().count((2048, 1536)) == 1


def test_the_bound_counts_as_many_prompt_tokens_as_the_processor_makes() -> None:
    from bench_engines import _TEMPLATE_WORDS, num_image_tokens
    from bench_lengths import QUICK
    from bench_model import SHAPES, processor
    from bench_peers import conversation
    from bench_requests import requests

    row = next(requests(QUICK["captions"], 512))
    made = processor(SHAPES["tiny"]).apply_chat_template(
        conversation(row), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = num_image_tokens(SHAPES["tiny"]) + _TEMPLATE_WORDS + len(row["question"].split())
    assert made["input_ids"].shape[1] == expected


def test_the_bound_is_bytes_over_bandwidth_or_flops_over_rate_whichever_takes_longer() -> None:
    from bench_ceiling import Ceiling, Shape, bound

    shape = Shape(1000, 100, 10, 1, 4, 4, 1, 4, num_patches=2, num_views=3, num_image_tokens=5)

    def at(bandwidth: float, rate: float, **changes: Any) -> Any:
        given: dict[str, Any] = {"prompt_tokens": [10, 10], "answer_tokens": [3, 3], "num_slots": 2, "num_pictures": 2}
        return bound(shape, Ceiling(bandwidth, {"bfloat16": rate}), "bfloat16", **given | changes)

    # Two steps read 1000 weights of 2 bytes; each of two rows sees 11 and then 12 tokens, of 2 x 4 numbers of 2 bytes.
    num_seen = 2 * (11 + 12)
    assert at(1.0, 1e30).decode_seconds == 2 * 2000 + num_seen * 16
    assert at(1e30, 1.0).decode_seconds == 4 * 2 * 1000 + 4 * num_seen * 4
    assert at(1.0, 1.0).vision_seconds == 2 * (3 * (2 * 100 * 2 + 4 * 4 * 4) + 2 * 10 * 5)
    alone, shared = at(1.0, 1.0).prefill_seconds, at(1.0, 1.0, num_pictures=1).prefill_seconds
    assert alone - shared == 2 * 1000 * 5  # the picture's tokens go through the decoder once


def test_weights_are_counted_by_what_they_are_applied_to() -> None:
    from bench_ceiling import shape_of
    from bench_model import SHAPES, config
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config(SHAPES["mid"])).to(torch.bfloat16)
    shape = shape_of(model, num_patches=257, num_image_tokens=256)
    assert model.num_parameters() == pytest.approx(121e6, rel=0.01)
    assert shape.decoder_parameters == 12 * (4 * 768**2 + 3 * 768 * 2304) + 768 * 4096
    assert shape.connector_parameters == 384 * 768 + 768 * 768
    assert shape.kv_bytes == 12 * 2 * 768 * 2


@pytest.mark.parametrize("side", ["loop", "padded", "compiled", "pipeline"])
def test_every_way_of_transformers_gives_each_row_its_length(side: str) -> None:
    from bench_lengths import QUICK
    from bench_model import SHAPES, config, processor
    from bench_peers import Generator, batches, pipelined
    from bench_requests import requests
    from transformers import LlavaForConditionalGeneration

    rows = list(requests(replace(QUICK["captions"], num_requests=5), 512))
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config(SHAPES["tiny"])).eval()
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    args = argparse.Namespace(side=side, max_new_tokens=12, max_prompt_tokens=80, batch_rows=2, num_workers=0)
    generator = Generator(model, processor(SHAPES["tiny"]), args)
    generator._settings.pop("compile_config", None)  # a minute, and the same numbers
    generator.expect(rows)
    answers = list((pipelined if side == "pipeline" else batches)(generator, rows, args))
    caps = [row["max_new_tokens"] for row in rows]
    assert generator.num_generated_tokens == sum(caps)
    assert [len(answer.split()) for answer in answers] == pytest.approx(caps, abs=1)  # special tokens are not shown
    groups = [caps[0:1], caps[1:2], caps[2:3], caps[3:4], caps[4:5]]
    if side != "loop":
        groups = [caps[0:2], caps[2:4], caps[4:5]]
    assert generator.counts["num_decode_steps"] == sum(max(group) - 1 for group in groups)
    assert generator.counts["num_decode_rows"] == sum(len(group) * (max(group) - 1) for group in groups)


def test_a_line_says_what_was_computed_for_nothing() -> None:
    found = line(run())
    assert found.steps_over_ideal == pytest.approx(20 / (36 / 2))
    assert found.prompt_padding == pytest.approx(0.25)
    assert found.idle_rows == pytest.approx(0.1)
    # 10 s of start-up, then 8 rows at 2 rows/s.
    assert found.cells()[3] == f"{8 / 14:.2f}"


def test_a_side_that_could_not_run_has_a_line_with_the_reason() -> None:
    from bench_table import table

    found = table([line(absent="vLLM is not installed", name="vLLM"), line(run())])
    assert "| vLLM | not measured: vLLM is not installed |" in found
    assert len({row.count("|") for row in found.splitlines()}) == 1


def test_targets_are_judged_on_enough_rows_and_only_where_both_sides_ran() -> None:
    from bench_figure import QUICK, Sizes
    from bench_table import judged

    slots, static = line(run(work_seconds=1.0)), line(run(work_seconds=1.9), name="ours: static, 16")
    missed = {figure.name: figure.passed for figure in judged([slots, static], "captions", Sizes())}
    assert missed["slots / ours: static, 16"] is False
    assert missed["slots: decode steps"] is False
    assert missed["slots: waiting for input"] is False
    assert not any("vLLM" in name for name in missed)
    quick = [figure.passed for figure in judged([slots, static], "captions", QUICK)]
    assert set(quick) == {None}


def test_a_side_that_answers_less_than_it_was_asked_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench_engines import Entry, Found, measure

    class Lazy:
        def run(self, setup: Any, num_rows: int) -> Any:
            return run(num_generated_tokens=39)

    found = Found(Entry(Lazy(), 2))
    measure("lazy", found, None, [10] * 4)  # type: ignore[arg-type]
    assert not found.runs
    assert "39 tokens, expected 4 and 40" in (found.absent or "")


def test_the_cpu_time_of_the_work_begins_when_the_model_is_loaded() -> None:
    from bench_trace import Trace

    trace = Trace(cpu={"main": 7.0, "worker 1": 2.0}, used=[(100.0, 1.0), (101.0, 3.0), (102.0, 6.0)])
    assert trace.cpu_seconds_after(101.5) == 9.0 - 3.0
    assert trace.cpu_seconds_after(99.0) == 9.0


def test_phases_of_a_run_are_found_on_both_levels_of_its_statistics() -> None:
    from bench_sides import phases

    stats = {"seconds": 9.0, "loading_seconds": 1.0, "waiting_for_input_seconds": 0.5, "engine": {"vision_seconds": 2}}
    assert phases(stats) == {"waiting_for_input": 0.5, "vision": 2.0}


def test_what_a_large_run_costs_follows_from_the_rates() -> None:
    from bench_scaling import Rates, accelerator_hours, bookkeeping, costs

    rates = Rates(50, 3, 10, 25, 2e5, 500, 1000, 1e5, 400, 1e-3, 20, 0.4)
    assert accelerator_hours(180_000, rates) == 1.0
    found = costs(180_000_000, rates)
    assert found["price"] == "3,000"
    assert found["cores an accelerator"] == "2.0"
    assert found["MB/s an accelerator"] == "10.0"
    assert bookkeeping(180_000_000, rates)["shards"] == "180,000"
    assert bookkeeping(180_000_000, rates)["tail, share of the run"] == "0.01%"


@pytest.mark.slow
def test_the_gpu_benchmark_runs_where_only_torch_and_transformers_are(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('hydra', 'datasets', 'omegaconf', 'pyarrow', 'psutil')))"
    code = f"{blocked}; sys.path.insert(0, {str(SCRIPTS)!r}); import bench_gpu; sys.exit(bench_gpu.main(sys.argv[1:]))"
    words = ["--tiny", "--device", "cpu", "--model", "qwen2_5_vl_7b", "--output", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "engines_gpu_qwen2_5_vl_7b.json").read_text())
    padded, ours = report["sides"]["padded generate, sdpa"], report["sides"]["ours: slots"]
    assert padded["work"]["num_tokens"] == ours["work"]["num_tokens"] > 0
    assert ours["work"]["num_decode_steps"] < padded["work"]["num_decode_steps"]
    assert "not measured: flash-attn" in (tmp_path / "engines_gpu_qwen2_5_vl_7b.md").read_text()


@pytest.mark.parametrize(
    ("name", "billions"), [("idefics2_8b", 8.40), ("qwen2_5_vl_7b", 8.29), ("smolvlm_256m", 0.256)]
)
def test_the_shapes_of_the_gpu_benchmark_are_those_of_the_published_models(name: str, billions: float) -> None:
    from gpu_shapes import PUBLISHED
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(PUBLISHED[name].config())
    assert model.num_parameters() == pytest.approx(billions * 1e9, rel=0.01)


@pytest.mark.slow
def test_the_quick_benchmark_writes_a_line_for_each_side_and_compares_logits(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "bench_engines.py"), "--quick", "--rounds", "1"]
    command += ["--workload", "questions", "--output", str(tmp_path)]
    command += [word for name in ("loop", "batch 16", "static, 16", "slots, 16") for word in ("--side", name)]
    found = subprocess.run([*command, "--vllm-python", "none"], capture_output=True, text=True, timeout=290)
    assert found.returncode == 0, found.stderr[-2000:]
    content = json.loads((tmp_path / "engines.json").read_text())
    sides = content["workloads"]["questions"]["sides"]
    for name in ("padded generate, batch 16", "ours: static, 16", "ours: slots, 16"):
        assert 0 < sides[name]["float32"]["logit_error"] < 1e-5
        assert sides[name]["float32"]["num_identical"] == sides[name]["float32"]["num_rows"] == 16
    assert len(sides["ours: slots, 16, a row per picture"]["runs"]) == 1
    assert (tmp_path / "engines.md").read_text() in found.stdout + "\n"

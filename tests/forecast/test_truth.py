"""A forecast against the run that it was made for."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from command_line import CommandLine


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("engine", ["auto", "static"])
def test_the_demo_takes_what_its_forecast_says(engine: str, vlm_batch: CommandLine, tmp_path: Path) -> None:
    """From the start of the command to its end: 1,210 rows from 200, slots and padded batches.

    Ratios of forecast to run were 0.88 to 1.07. Others may come and go between the two, so up to five pairs are looked
    at: a forecast that is wrong by itself is wrong in each.
    """
    ratios: list[float] = []
    while not ratios or (not 0.75 < ratios[-1] < 1.25 and len(ratios) < 5):
        ratios.append(forecast_over_run(vlm_batch, tmp_path, f"engine={engine}", f"output_dir=out{len(ratios)}"))
    assert 0.75 < ratios[-1] < 1.25, ratios


def forecast_over_run(vlm_batch: CommandLine, folder: Path, *words: str) -> float:
    """Of the time; lengths of answers and bytes have to be right at once."""
    found = json.loads(vlm_batch("plan", "json=true", *words).stdout)
    began = time.monotonic()
    vlm_batch("run", *words)
    took = time.monotonic() - began
    output_dir = folder / words[-1].removeprefix("output_dir=")
    (path,) = (output_dir / "stats").glob("worker-*.json")
    stats = json.loads(path.read_text())
    mean = stats["num_generated_tokens"] / stats["num_answered"]
    assert 0.75 * mean < found["answers"]["mean_num_generated_tokens"]["value"] < 1.25 * mean
    data_bytes = sum(path.stat().st_size for path in (output_dir / "data").iterdir())
    assert 0.75 < found["disk"]["data_bytes"] / data_bytes < 1.25
    forecast: float = found["time"]["seconds"]["value"]
    return forecast / took

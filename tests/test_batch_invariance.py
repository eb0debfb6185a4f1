"""A batch never changes an answer: in float32, token for token, whatever the batch size and the number of workers."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import CommandLine

SAME = ["id", "response", "finish_reason", "num_prompt_tokens", "num_generated_tokens", "row_key"]


@pytest.mark.timeout(400)
def test_batch_size_and_workers_do_not_change_answers(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """240 rows of one and two images, alone, in odd batches, and in full ones."""
    tables = {}
    for name, words in {
        "alone": ["engine.max_batch_rows=1"],
        "threes": ["engine.max_batch_rows=3", "engine.num_workers=2", "write.shard_rows=50"],
        "full": ["engine.max_batch_rows=64"],
    }.items():
        vlm_batch("run", "dataset.max_rows=240", f"output_dir={name}", *words)
        tables[name] = pq.read_table(tmp_path / name / "data", columns=SAME)
    assert tables["threes"].equals(tables["alone"])
    assert tables["full"].equals(tables["alone"])

"""The end of `make demo`: rows, errors, speed, exact-match accuracy, and where the files are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

LEAST_ACCURACY = 0.97


def main(output_dir: Path) -> int:
    table = pq.read_table(output_dir / "data", columns=["id", "question", "answer", "response", "status"])
    num_errors = pc.sum(pc.equal(table["status"], "error")).as_py()
    equal = pc.fill_null(pc.equal(table["response"], table["answer"]), False)
    accuracy = pc.mean(equal.cast("float64")).as_py()
    workers = [json.loads(path.read_text()) for path in (output_dir / "stats").glob("worker-*.json")]
    latest = max(workers, key=lambda worker: worker["started"], default=None)
    print(f"rows          {len(table):,}")
    print(f"errors        {num_errors:,}")
    if latest:
        print(f"rows/s        {latest['rows_per_second']:.1f}")
    print(f"exact match   {accuracy:.4f} of the answers equal the column 'answer'")
    print(f"files         {output_dir / 'data'}")
    if accuracy < LEAST_ACCURACY:
        print(f"The demo model answers at least {LEAST_ACCURACY:.0%} right; something is broken.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo")))

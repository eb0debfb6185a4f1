"""Make the demo's test set: python scripts/make_demo_data.py --output pipeline/dataset/demo.parquet

1,210 questions about pictures composed from digits that the demo model never saw, in the form that the `datasets`
library gives image datasets. The same library versions give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from demo_digits import TASKS, Digits, Example, example, load_digits
from PIL import Image

SEED = 20240229
ROWS_PER_TASK = 110
ROW_GROUP_ROWS = 200


def test_examples(digits: Digits) -> list[Example]:
    """The rows of the test set: as many of every task, shuffled."""
    rng = np.random.default_rng(SEED)
    examples = [example(digits, rng, task) for task in TASKS for _ in range(ROWS_PER_TASK)]
    return [examples[place] for place in rng.permutation(len(examples))]


def png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", optimize=True)
    return encoded.getvalue()


def make_table(examples: list[Example]) -> pa.Table:
    """Columns id, images, question, answer, task, with the features `datasets` reads from the schema's metadata."""
    text = {"dtype": "string", "_type": "Value"}
    features = {
        "id": text,
        "images": {"feature": {"_type": "Image"}, "_type": "List"},
        "question": text,
        "answer": text,
        "task": text,
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("images", pa.list_(image)),
            ("question", pa.string()),
            ("answer", pa.string()),
            ("task", pa.string()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [
        {
            "id": f"digits-{number:05d}",
            "images": [{"bytes": png(one), "path": None} for one in row.images],
            "question": row.question,
            "answer": row.answer,
            "task": row.task,
        }
        for number, row in enumerate(examples)
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Parquet file to write")
    args = parser.parse_args()
    _, test = load_digits()
    table = make_table(test_examples(test))
    pq.write_table(table, args.output, row_group_size=ROW_GROUP_ROWS, compression="zstd", write_page_checksum=True)
    print(f"{table.num_rows} rows, {args.output.stat().st_size:,} bytes: {args.output}")


if __name__ == "__main__":
    main()

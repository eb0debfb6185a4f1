"""Requests that no download is needed for: pictures of the sizes of COCO's, a question and a length of answer each.

Every side of a benchmark reads the same Parquet file: id, images list<struct<bytes, path>>, question, max_new_tokens.
With random weights an answer never ends by itself, so its length is given; it is the same for all.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench_lengths import Workload, lengths
from bench_model import words
from PIL import Image

# Width and height of pictures and how many of twenty have them.
PICTURES = (((640, 480), 9), ((480, 640), 5), ((500, 375), 5), ((2048, 1536), 1))
_QUALITY = 90
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("question", pa.string()),
        ("max_new_tokens", pa.int32()),
    ]
)


def picture(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG with soft shapes and some grain, which makes its bytes about as many as those of a photograph."""
    random = np.random.default_rng(number)
    width, height = size
    soft = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = random.normal(0, 6, (height, width, 1))
    content = np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(content).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def sizes() -> list[tuple[int, int]]:
    """Twenty picture sizes in their shares, in an order of no meaning."""
    found = [size for size, share in PICTURES for _ in range(share)]
    return [found[place] for place in np.random.default_rng(2).permutation(len(found))]


def requests(load: Workload, vocab_size: int) -> Iterator[dict[str, Any]]:
    """The rows. Questions about one picture follow each other and have answers of one length."""
    random = np.random.default_rng(3)
    vocabulary, cycle, caps = words(vocab_size)[8:], sizes(), lengths(load)
    least, most = load.num_words
    for place in range(load.num_pictures):
        content = picture(place, cycle[place % len(cycle)])
        for number in range(load.num_questions):
            chosen = random.integers(0, len(vocabulary), random.integers(least, most + 1))
            yield {
                "id": f"request-{place:05d}-{number}",
                "images": [{"bytes": content, "path": None}],
                "question": " ".join(vocabulary[word] for word in chosen),
                "max_new_tokens": caps[place],
            }


def write_requests(path: Path, load: Workload, vocab_size: int) -> None:
    """The workload as a Parquet file."""
    pq.write_table(pa.Table.from_pylist(list(requests(load, vocab_size)), SCHEMA), path)


def write_by_picture(rows: Path, path: Path, num_questions: int) -> None:
    """The same requests with one row for each picture, and its questions in columns question_0, question_1 ..."""
    found = pq.read_table(rows).to_pylist()
    first = found[::num_questions]
    table = {name: pa.array([row[name] for row in first], SCHEMA.field(name).type) for name in SCHEMA.names}
    del table["question"]
    for number in range(num_questions):
        table[f"question_{number}"] = pa.array([row["question"] for row in found[number::num_questions]])
    pq.write_table(pa.table(table), path)

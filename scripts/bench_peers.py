"""The two ways people do this job with transformers alone, as one process each, for scripts/bench.py.

    python bench_peers.py loop     --model DIR --rows FILE --output FILE ...    the loop of the guide, a row at a time
    python bench_peers.py pipeline --model DIR --rows FILE --output FILE ...    transformers.pipeline(batch_size=B)

Both read the encoded images of a Parquet file, decode them with Pillow, generate in float32 and write a Parquet file of
answers. The last line is JSON: seconds of each phase. Run from outside the checkout, whose package is called pipeline.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of one row, images decoded."""
    from PIL import Image

    images = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in row["images"]]
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": row["question"]}]}]


def loop(rows: list[dict[str, Any]], args: argparse.Namespace) -> Iterator[str]:
    """One row at a time: apply_chat_template, generate, batch_decode. Yields once before the first row."""
    import torch
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(args.model)
    model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    yield ""
    for row in rows:
        inputs = processor.apply_chat_template(
            conversation(row), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        yield processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def batched(rows: list[dict[str, Any]], args: argparse.Namespace) -> Iterator[str]:
    """transformers' own batching. Yields once before the first row."""
    import torch
    import transformers
    from transformers.utils.chat_template_utils import Chat

    class Chats(torch.utils.data.Dataset):  # type: ignore[type-arg]
        """Rows as conversations, made when asked for, so that the library's own processes can do it."""

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, place: int) -> Any:
            return Chat(conversation(rows[place]))

    build = transformers.pipeline  # noqa: TID251 - its own package, under its own name
    generator = build("image-text-to-text", model=args.model, dtype=torch.float32)
    yield ""
    for found in generator(
        Chats(),
        batch_size=args.batch_rows,
        num_workers=args.num_workers,
        return_full_text=False,
        generate_kwargs={"max_new_tokens": args.max_new_tokens, "do_sample": False},
    ):
        record = found[0] if isinstance(found, list) else found
        yield record["generated_text"].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["loop", "pipeline"])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--rows", required=True, help="Parquet file with id, images and question")
    parser.add_argument("--output", type=Path, required=True, help="Parquet file to write: id, response")
    parser.add_argument("--num-rows", type=int, required=True, help="answer the first so many rows")
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--num-threads", type=int, default=1, help="torch threads")
    parser.add_argument("--batch-rows", type=int, default=1)
    parser.add_argument("--num-workers", type=int, default=0, help="worker processes of the library's data loader")
    args = parser.parse_args()

    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    torch.set_num_threads(args.num_threads)
    rows = pq.read_table(args.rows, columns=["id", "images", "question"]).slice(0, args.num_rows).to_pylist()
    answers = loop(rows, args) if args.side == "loop" else batched(rows, args)
    next(answers)
    loaded = time.perf_counter()
    table = pa.table({"id": [row["id"] for row in rows], "response": list(answers)})
    pq.write_table(table, args.output)
    done = time.perf_counter()
    print(json.dumps({"num_rows": len(rows), "loading_seconds": loaded - STARTED, "work_seconds": done - loaded}))


if __name__ == "__main__":
    main()

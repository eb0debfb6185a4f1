"""The ways people do this job with transformers alone, as one process each, for the benchmarks.

    python bench_peers.py loop     --model DIR --rows FILE --output FILE ...    the loop of the guide, a row at a time
    python bench_peers.py padded   ...    generate() over batches of --batch-rows rows in the file's order
    python bench_peers.py compiled ...    the same over a static cache, its decode step compiled
    python bench_peers.py pipeline ...    transformers.pipeline(batch_size=B)

All read the encoded images of a Parquet file, decode them with Pillow and write a Parquet file of answers. Where the
file has a column max_new_tokens, each row's answer is that long whatever the model says. The last line is JSON: seconds
of each phase and what was computed. Run from outside the checkout, whose package is called pipeline.
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
Row = dict[str, Any]


class Generator:
    """A model and its processor; what generate() computes is counted, and each row's tokens end at its own cap."""

    def __init__(self, model: Any, processor: Any, args: argparse.Namespace) -> None:
        self.model, self.processor = model, processor
        self.counts = dict.fromkeys(
            ("num_prompt_tokens", "num_padded_prompt_tokens", "num_decode_steps", "num_decode_rows"), 0
        )
        self.num_generated_tokens = 0
        self.generating_seconds = 0.0
        self._generate, self._longest = model.generate, args.max_new_tokens
        self._waiting: list[Row] = []
        self._settings: dict[str, Any] = {}
        if args.side == "compiled":
            import transformers

            # One shape for all batches. transformers compiles by itself on accelerators alone.
            compiling = transformers.CompileConfig(mode=None, fullgraph=False)
            compiling._compile_all_devices = True
            self._settings = {"cache_implementation": "static", "compile_config": compiling}

    def expect(self, rows: list[Row]) -> None:
        """What generate() will be called for, in this order."""
        self._waiting += rows
        if any("max_new_tokens" in row for row in rows):
            self.model.generation_config.eos_token_id = None

    def generate(self, **inputs: Any) -> Any:
        """generate() for the next rows: [B, prompt + answer], pads in place of what lies behind a row's cap."""
        import torch
        import transformers

        num_rows, width = inputs["input_ids"].shape
        rows, self._waiting = self._waiting[:num_rows], self._waiting[num_rows:]
        caps_B = torch.tensor([row.get("max_new_tokens", self._longest) for row in rows])

        class Caps(transformers.StoppingCriteria):  # type: ignore[misc]
            """A row is done when it has its length; the batch when all rows are."""

            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                return caps_B <= input_ids.shape[1] - width

        longest = self._longest if self._settings else int(caps_B.max())  # of a static cache: one size for all
        settings = self._settings | {"max_new_tokens": longest, "do_sample": False}
        inputs = {name: value for name, value in inputs.items() if name not in settings}
        criteria = transformers.StoppingCriteriaList([Caps()])
        began = time.perf_counter()
        tokens_BT = self._generate(**inputs, **settings, stopping_criteria=criteria)
        self.generating_seconds += time.perf_counter() - began
        num_steps = tokens_BT.shape[1] - width - 1  # the first token comes with the prompt
        self.counts["num_prompt_tokens"] += int(inputs["attention_mask"].sum())
        self.counts["num_padded_prompt_tokens"] += num_rows * width
        self.counts["num_decode_steps"] += num_steps
        self.counts["num_decode_rows"] += num_rows * num_steps
        behind_BS = torch.arange(tokens_BT.shape[1] - width) >= caps_B[:, None]
        tokens_BT[:, width:][behind_BS] = self.processor.tokenizer.pad_token_id
        kept_BS = tokens_BT[:, width:] != self.processor.tokenizer.pad_token_id
        exact = self.model.generation_config.eos_token_id is None  # then no row ends before its cap
        self.num_generated_tokens += int(caps_B.sum()) if exact else int(kept_BS.sum())
        return tokens_BT

    def encoded(self, rows: list[Row], **padding: Any) -> Any:
        """Inputs of generate() for some rows, the tokens padded in front."""
        return self.processor.apply_chat_template(
            [conversation(row) for row in rows],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"} | padding,
        ).to(self.model.dtype)

    def answered(self, rows: list[Row], **padding: Any) -> list[str]:
        """The answers of one batch."""
        inputs = self.encoded(rows, **padding)
        tokens_BT = self.generate(**inputs)
        new_BT = tokens_BT[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.processor.batch_decode(new_BT, skip_special_tokens=True)
        return texts


def conversation(row: Row) -> list[dict[str, Any]]:
    """The messages of one row, images decoded."""
    from PIL import Image

    images = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in row["images"]]
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": row["question"]}]}]


def batches(generator: Generator, rows: list[Row], args: argparse.Namespace) -> Iterator[str]:
    """Batches in the file's order; one row at a time for `loop`, all of one width for `compiled`."""
    num_rows = 1 if args.side == "loop" else args.batch_rows
    width = {"padding": "max_length", "max_length": args.max_prompt_tokens} if args.side == "compiled" else {}
    for start in range(0, len(rows), num_rows):
        yield from generator.answered(rows[start : start + num_rows], **width)


def pipelined(generator: Generator, rows: list[Row], args: argparse.Namespace) -> Iterator[str]:
    """transformers' own batching."""
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
    dtype = generator.model.dtype
    made = build("image-text-to-text", model=generator.model, processor=generator.processor, dtype=dtype)
    generator.model.generate = generator.generate
    for found in made(
        Chats(),
        batch_size=args.batch_rows,
        num_workers=args.num_workers,
        return_full_text=False,
        generate_kwargs={"max_new_tokens": args.max_new_tokens, "do_sample": False},
    ):
        record = found[0] if isinstance(found, list) else found
        yield record["generated_text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["loop", "padded", "compiled", "pipeline"])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--rows", required=True, help="Parquet file with id, images, question and perhaps a length")
    parser.add_argument("--output", type=Path, required=True, help="Parquet file to write: id, response")
    parser.add_argument("--num-rows", type=int, required=True, help="answer the first so many rows")
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--max-prompt-tokens", type=int, help="width of every batch of `compiled`")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-threads", type=int, default=1, help="torch threads")
    parser.add_argument("--batch-rows", type=int, default=1)
    parser.add_argument("--num-workers", type=int, default=0, help="worker processes of the library's data loader")
    args = parser.parse_args()

    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.num_threads)
    file = pq.ParquetFile(args.rows)
    columns = [name for name in ("id", "images", "question", "max_new_tokens") if name in file.schema_arrow.names]
    rows = file.read(columns=columns).slice(0, args.num_rows).to_pylist()
    dtype = getattr(torch, args.dtype)
    model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).eval()
    generator = Generator(model, transformers.AutoProcessor.from_pretrained(args.model), args)
    warming_seconds = 0.0
    if args.side == "compiled":  # minutes, once for each shape
        generator.expect(rows[: args.batch_rows])
        began = time.perf_counter()
        list(batches(generator, rows[: args.batch_rows], args))
        warming_seconds = time.perf_counter() - began
        generator = Generator(model, generator.processor, args)
    generator.expect(rows)
    loaded, loaded_at = time.perf_counter(), time.time()
    answers = (pipelined if args.side == "pipeline" else batches)(generator, rows, args)
    table = pa.table({"id": [row["id"] for row in rows], "response": [answer.strip() for answer in answers]})
    pq.write_table(table, args.output)
    done = time.perf_counter()
    report = {
        "num_rows": len(rows),
        "loading_seconds": loaded - STARTED,
        "warming_seconds": warming_seconds,
        "work_seconds": done - loaded,
        "waiting_for_input_seconds": done - loaded - generator.generating_seconds,
        "loaded_at": loaded_at,
        "num_generated_tokens": generator.num_generated_tokens,
        "numerics": {"dtype": args.dtype, "num_threads": args.num_threads},
    }
    print(json.dumps(report | {"engine": generator.counts}))


if __name__ == "__main__":
    main()

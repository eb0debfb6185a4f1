"""What a large run costs, from rates that you put in: python scripts/bench_scaling.py --rows-per-second 60

Prints the tables of docs/scaling.md. Nothing is measured here: every rate is an argument, and its default is a number
that the page gives the origin of. `--bound` adds what a GPU could do at most with three published models (it imports
torch to count their weights), for ceilings that are arguments too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCALES = (1_000_000, 100_000_000, 1_000_000_000)


@dataclass(frozen=True, slots=True)
class Rates:
    """One accelerator, and what stands around it."""

    rows_per_second: float
    price_per_hour: float
    num_accelerators: int
    images_per_core_second: float  # decoded and preprocessed by one core
    image_bytes: float
    row_bytes: float  # of output
    shard_rows: int
    files_listed_per_second: float
    plan_file_bytes: float  # memory of the planning process for each listed file
    shard_check_seconds: float  # a finished shard is recognised in so many
    requests_per_second: float  # of an object store, one after the other
    price_per_million_requests: float


def accelerator_hours(num_images: int, rates: Rates) -> float:
    return num_images / rates.rows_per_second / 3600


def costs(num_images: int, rates: Rates) -> dict[str, str]:
    """What the accelerators take, and what has to feed them."""
    hours = accelerator_hours(num_images, rates)
    fleet = rates.rows_per_second * rates.num_accelerators
    return {
        "accelerator hours": f"{hours:,.0f}",
        f"days on {rates.num_accelerators}": f"{hours / rates.num_accelerators / 24:,.2f}",
        "price": f"{hours * rates.price_per_hour:,.0f}",
        "cores an accelerator": f"{rates.rows_per_second / rates.images_per_core_second:.1f}",
        "MB/s an accelerator": f"{rates.rows_per_second * rates.image_bytes / 1e6:.1f}",
        "GB/s in all": f"{fleet * rates.image_bytes / 1e9:.2f}",
        "input, TB": f"{num_images * rates.image_bytes / 1e12:,.1f}",
        "output, GB": f"{num_images * rates.row_bytes / 1e9:,.0f}",
    }


def bookkeeping(num_images: int, rates: Rates) -> dict[str, str]:
    """What grows beside the accelerators' work: an image a file, or images in files of shard_rows rows."""
    num_shards = math.ceil(num_images / rates.shard_rows)
    own_seconds = num_images / rates.rows_per_second / rates.num_accelerators
    one_by_one = num_images / rates.requests_per_second
    return {
        "shards": f"{num_shards:,}",
        "a shard, minutes": f"{rates.shard_rows / rates.rows_per_second / 60:.1f}",
        "tail, share of the run": f"{rates.shard_rows / rates.rows_per_second / own_seconds:.2%}",
        "recognised in, s": f"{num_shards * rates.shard_check_seconds:,.1f}",
        "listing files, s": f"{num_images / rates.files_listed_per_second:,.0f}",
        "planning files, GB": f"{num_images * rates.plan_file_bytes / 1e9:,.1f}",
        "LIST requests": f"{math.ceil(num_images / 1000):,}",
        "one GET an image": f"{num_images / 1e6 * rates.price_per_million_requests:,.0f}",
        "GETs one by one, h": f"{one_by_one / 3600:,.1f}",
        "GETs in flight": f"{rates.rows_per_second / rates.requests_per_second:.1f}",
    }


def bounds(bytes_per_second: float, flops_per_second: float, num_new_tokens: int) -> list[dict[str, str]]:
    """Rows/s that three published models could reach on one GPU at 64 slots and at 256."""
    import torch
    import transformers
    from bench_ceiling import Ceiling, bound, shape_of
    from gpu_shapes import PUBLISHED

    found = []
    for made in PUBLISHED.values():
        with torch.device("meta"):
            model: Any = transformers.AutoModelForImageTextToText.from_config(made.config(), dtype=torch.bfloat16)
        shape = shape_of(
            model,
            num_patches=made.num_patches,
            num_views=made.num_views,
            num_image_tokens=made.image_tokens.count(made.image_token_id),
        )
        line = {"model": made.name, "prompt": f"{len(made.image_tokens) + 25}"}
        for num_slots in (64, 256):
            at = bound(
                shape,
                Ceiling(bytes_per_second, {"bfloat16": flops_per_second}),
                "bfloat16",
                prompt_tokens=[len(made.image_tokens) + 25] * num_slots,
                answer_tokens=[num_new_tokens] * num_slots,
                num_slots=num_slots,
                num_pictures=num_slots,
            )
            line |= {
                "vision, ms": f"{1000 * at.vision_seconds / num_slots:.2f}",
                "prompt, ms": f"{1000 * at.prefill_seconds / num_slots:.2f}",
                f"a step of {num_slots}, ms": f"{1000 * at.decode_seconds / (num_new_tokens - 1):.2f}",
                f"rows/s at {num_slots}": f"{num_slots / at.seconds:,.0f}",
            }
        found.append(line)
    return found


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows of equal columns as Markdown."""
    head = list(rows[0])
    lines = [head, ["---:"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows-per-second", type=float, default=50.0, help="of one accelerator, all in")
    parser.add_argument("--price-per-hour", type=float, default=3.0, help="of one accelerator")
    parser.add_argument("--num-accelerators", type=int, default=64)
    parser.add_argument("--images-per-core-second", type=float, default=90.0)
    parser.add_argument("--image-bytes", type=float, default=130e3)
    parser.add_argument("--row-bytes", type=float, default=500.0)
    parser.add_argument("--shard-rows", type=int, default=1000)
    parser.add_argument("--files-listed-per-second", type=float, default=157e3)
    parser.add_argument("--plan-file-bytes", type=float, default=350.0)
    parser.add_argument("--shard-check-seconds", type=float, default=0.7e-3)
    parser.add_argument("--requests-per-second", type=float, default=20.0, help="of one connection")
    parser.add_argument("--price-per-million-requests", type=float, default=0.4)
    parser.add_argument("--bound", action="store_true", help="the bound of three published models as well")
    parser.add_argument("--terabytes-per-second", type=float, default=4.3, help="of the bound's GPU")
    parser.add_argument("--teraflops", type=float, default=790.0, help="of the bound's GPU, in bfloat16")
    parser.add_argument("--new-tokens", type=int, default=100, help="of an answer, for the bound")
    args = vars(parser.parse_args(argv))
    rates = Rates(**{name: args[name] for name in Rates.__dataclass_fields__})
    for part in (costs, bookkeeping):
        print(table([{"images": f"{number:,}"} | part(number, rates) for number in SCALES]), end="\n\n")
    if args["bound"]:
        print(table(bounds(args["terabytes_per_second"] * 1e12, args["teraflops"] * 1e12, args["new_tokens"])))


if __name__ == "__main__":
    main()

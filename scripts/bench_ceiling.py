"""What a machine could do at most: its copy bandwidth and matrix rate, and the time that a workload takes at those.

    python bench_ceiling.py --model DIR --num-threads 2     prints JSON: ceilings, and the shape of a LLaVA model

The bound counts what nobody can leave out. Vision and prompts are matrix products: 2 flops for each weight and
position, and attention's own. A decode step reads all weights of the decoder once and each live key and value once, and
takes the longer of the two times: bytes over bandwidth, flops over rate. Parts do not overlap, slots are always full,
and nothing else takes time: no decoding of pictures, no sampling, no caches too small.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

_CONNECTOR = re.compile(r"connector|projector|merger|aligner")
_COPY_BYTES = 1 << 28  # above any cache
_MATRIX_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The measured machine. Bandwidth counts what is read and what is written."""

    bytes_per_second: float
    flops_per_second: dict[str, float]  # by dtype


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides its time. Parameters are those of matrices."""

    decoder_parameters: int  # without the embedding, with the head
    vision_parameters: int  # applied to each patch
    connector_parameters: int  # applied to each image token: too little where it works on patches
    num_layers: int
    attention_width: int  # heads x dimension
    kv_width: int  # of keys: heads x dimension
    vision_layers: int
    vision_width: int
    num_patches: int  # of a view
    num_views: int  # of a picture: tiles that do not see each other
    num_image_tokens: int  # that a picture takes in the prompt
    weight_bytes: int = 2

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.kv_width * self.weight_bytes


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds at the ceiling for a whole workload."""

    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        return self.vision_seconds + self.prefill_seconds + self.decode_seconds


def bound(
    shape: Shape,
    ceiling: Ceiling,
    dtype: str,
    *,
    prompt_tokens: Sequence[int],
    answer_tokens: Sequence[int],
    num_slots: int,
    num_pictures: int,
) -> Bound:
    """The bound of a workload: a request has a prompt and an answer of so many tokens each.

    dtype: a CPU may multiply bfloat16 faster as float32: the faster of the two counts.
    num_pictures: different ones. A picture is encoded once, and its tokens go through the decoder once, however many
        requests ask about it.
    """
    bandwidth = ceiling.bytes_per_second
    rate = max(ceiling.flops_per_second.values()) if dtype != "float32" else ceiling.flops_per_second[dtype]
    patches, layers = shape.num_patches, shape.num_layers
    view_flops = 2 * shape.vision_parameters * patches + 4 * shape.vision_layers * patches**2 * shape.vision_width
    vision_flops = shape.num_views * view_flops + 2 * shape.connector_parameters * shape.num_image_tokens
    spared = (len(prompt_tokens) - num_pictures) * shape.num_image_tokens  # positions that prompts share
    prefill_flops = 2 * shape.decoder_parameters * (sum(prompt_tokens) - spared)
    prefill_flops += sum(2 * layers * length**2 * shape.attention_width for length in prompt_tokens)
    # The first token of an answer comes from the prefill.
    num_rows = sum(length - 1 for length in answer_tokens)
    num_steps = num_rows / min(num_slots, len(answer_tokens))
    live = sum(
        (length - 1) * prompt + length * (length - 1) // 2
        for prompt, length in zip(prompt_tokens, answer_tokens, strict=True)
    )
    read_bytes = num_steps * shape.decoder_parameters * shape.weight_bytes + live * shape.kv_bytes
    decode_flops = 2 * shape.decoder_parameters * num_rows + 4 * layers * live * shape.attention_width
    return Bound(
        vision_seconds=num_pictures * vision_flops / rate,
        prefill_seconds=prefill_flops / rate,
        decode_seconds=max(read_bytes / bandwidth, decode_flops / rate),
    )


def shape_of(model: Any, *, num_patches: int, num_image_tokens: int, num_views: int = 1) -> Shape:
    """The shape of a transformers model, which may be on the meta device."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    head = model.get_output_embeddings().weight
    embeddings = {id(module.weight) for module in model.modules() if type(module).__name__ == "Embedding"} | {id(head)}
    decoder = {id(weight) for weight in model.get_decoder().parameters()}
    count = {"decoder": head.numel(), "vision": 0, "connector": 0}
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and id(weight) not in embeddings:
            part = "connector" if _CONNECTOR.search(name) else "vision"
            count["decoder" if id(weight) in decoder else part] += weight.numel()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        decoder_parameters=count["decoder"],
        vision_parameters=count["vision"],
        connector_parameters=count["connector"],
        num_layers=text.num_hidden_layers,
        attention_width=heads * width,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * width,
        # Attention within a small window costs next to nothing: only the layers that see the whole picture count.
        vision_layers=len(getattr(vision, "fullatt_block_indexes", ()))
        or getattr(vision, "num_hidden_layers", None)
        or vision.depth,
        vision_width=vision.hidden_size,
        num_patches=num_patches,
        num_views=num_views,
        num_image_tokens=num_image_tokens,
        weight_bytes=model.dtype.itemsize,
    )


def measured(device: str = "cpu", dtypes: Sequence[str] = ("bfloat16", "float32"), seconds: float = 1.0) -> Ceiling:
    """Copy a large tensor and multiply square matrices for about so many seconds each; the best run counts."""
    import torch

    def synchronize() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    def best(work: Callable[[], Any]) -> float:
        """The quickest of repeated runs: a ceiling is not lower because somebody else was at work."""
        for _ in range(2):
            work()
        synchronize()
        found: list[float] = []
        began = time.perf_counter()
        while len(found) < 3 or time.perf_counter() - began < seconds:
            started = time.perf_counter()
            work()
            synchronize()
            found.append(time.perf_counter() - started)
        return min(found)

    size_bytes = _COPY_BYTES * (8 if device.startswith("cuda") else 1)
    source = torch.ones(size_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    rates = {}
    for name in dtypes:
        found = []
        for size in _MATRIX_SIZES[device.partition(":")[0]]:
            matrix = torch.randn(size, size, device=device).to(getattr(torch, name))
            for multiply in (torch.mm, torch.nn.functional.linear):  # the second matrix as it is, and transposed
                found.append(2 * size**3 / best(partial(multiply, matrix, matrix)))
        rates[name] = max(found)
    return Ceiling(bandwidth, rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    args = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(args.num_threads)
    config = transformers.AutoConfig.from_pretrained(args.model)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    vision = config.vision_config
    num_patches = (vision.image_size // vision.patch_size) ** 2
    # CLIP has a class token beside its patches.
    shape = shape_of(model, num_patches=num_patches + 1, num_image_tokens=num_patches)
    print(json.dumps({"ceiling": asdict(measured(seconds=args.seconds)), "shape": asdict(shape)}))


if __name__ == "__main__":
    main()

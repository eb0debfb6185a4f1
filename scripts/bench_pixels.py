"""Images per second that one core prepares for SmolVLM's default 13 tiles: transformers' processor, and compact images.

    python scripts/bench_pixels.py [--turns N] [--images N] [--json FILE]

Every side is a process of its own with one thread, from JPEG bytes to the message that a worker would send; the sides
take turns. Rates are per second of the process's own CPU time, so that a busy machine disturbs them little.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
_SIZE = (640, 480)
# Sides: what prepares the images, and what the environment adds.
SIDES: dict[str, tuple[str, dict[str, str]]] = {
    "transformers": ("transformers", {}),
    "transformers, malloc settings": ("transformers", _MALLOC),
    "ours, processed": ("processed", _MALLOC),
    "ours, resized": ("resized", _MALLOC),
    "ours, decoded": ("decoded", _MALLOC),
}
_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--images", type=int, default=8, help="in a turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _serve(options.side, options.folder, options.images)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_processor(Path(folder))
        report = measured(Path(folder), options.turns, options.images)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measured(folder: Path, num_turns: int, num_images: int) -> dict[str, Any]:
    """All sides, in turns; the first and last to go change places from turn to turn."""
    sides = {name: _Side(kind, folder, num_images, environment) for name, (kind, environment) in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for side in sides.values():
            side.ask("warm")
        for turn in range(num_turns):
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                seconds[name].append(sides[name].ask("known")["seconds"])
        found = {
            name: {
                "images_per_second": statistics.median(num_images / value for value in seconds[name]),
                "lowest": num_images / max(seconds[name]),
                "highest": num_images / min(seconds[name]),
                "bytes_per_image": side.ask("bytes")["bytes"],
                "new_size_seconds": side.ask("new")["seconds"] / num_images,
            }
            for name, side in sides.items()
        }
        device = {
            f"{name}, {way}": value
            for name in ("decoded", "resized")
            for way, value in sides[f"ours, {name}"].ask("device").items()
        }
    finally:
        for side in sides.values():
            side.close()
    return {
        "sides": found,
        "device_seconds_per_image": device,
        "processor": "Idefics3ImageProcessorPil, longest edge 2048, tiles of 512",
        "images": f"JPEG, {_SIZE[0]} x {_SIZE[1]}, {num_images} in a turn, {num_turns} turns",
        "cpu": _cpu(),
        "versions": {"pillow": PIL.__version__, "numpy": np.__version__, **_versions()},
    }


def table(report: dict[str, Any]) -> str:
    base = report["sides"]["transformers"]["images_per_second"]
    lines = [
        f"{report['images']}; {report['cpu']}; {report['versions']}",
        f"{'one core':32s} {'images/s':>9s} {'range':>15s} {'factor':>7s} {'MB/image':>9s} {'new size, ms':>13s}",
    ]
    for name, side in report["sides"].items():
        span = f"{side['lowest']:.1f}-{side['highest']:.1f}"
        lines.append(
            f"{name:32s} {side['images_per_second']:9.1f} {span:>15s} {side['images_per_second'] / base:7.1f} "
            f"{side['bytes_per_image'] / 1e6:9.2f} {1000 * side['new_size_seconds']:13.0f}"
        )
    lines.append("device half, ms an image: ")
    lines[-1] += ", ".join(f"{name} {1000 * value:.1f}" for name, value in report["device_seconds_per_image"].items())
    return "\n".join(lines)


class _Side:
    """A process that prepares images when it is asked to."""

    def __init__(self, kind: str, folder: Path, num_images: int, environment: dict[str, str]) -> None:
        words = [sys.executable, __file__, "--side", kind, "--folder", str(folder), "--images", str(num_images)]
        inherited = {name: value for name, value in os.environ.items() if name not in _MALLOC}
        single = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=inherited | single | environment
        )

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a side ended with exit code {self._process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


# Inside a side -------------------------------------------------------------------------------------------------------


def _serve(kind: str, folder: Path, num_images: int) -> None:
    import torch

    torch.set_num_threads(1)
    prepare = _transformers(folder) if kind == "transformers" else _ours(folder, kind)
    photos = [jpeg(*_SIZE, seed=seed) for seed in range(num_images)]
    # Sizes of their own, cut into as many tiles, in whose kind the warm-up has been.
    new = [jpeg(_SIZE[0], _SIZE[1] - 2 * number - 31, seed=number) for number in range(num_images)]
    for line in sys.stdin:
        match line.strip():
            case "warm":
                for number in range(6):
                    prepare(photos[number % num_images])
                    prepare(jpeg(_SIZE[0], _SIZE[1] - 2 * number - 7, seed=number))
                answer: dict[str, Any] = {}
            case "known":
                answer = {"seconds": _seconds(prepare, photos)}
            case "new":
                answer = {"seconds": _seconds(prepare, new)}
            case "bytes":
                answer = {"bytes": len(prepare(photos[0]))}
            case _:
                answer = _device_half(prepare(photos[0]))
        print(json.dumps(answer), flush=True)


def _seconds(prepare: Callable[[bytes], bytes], photos: Sequence[bytes]) -> float:
    start = time.process_time()
    for photo in photos:
        prepare(photo)
    return time.process_time() - start


def _transformers(folder: Path) -> Callable[[bytes], bytes]:
    """The processor as anybody calls it."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this image."}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)

    def prepare(photo: bytes) -> bytes:
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        batch = processor(text=[text], images=[[image]], return_tensors="pt")
        return pickle.dumps({name: tensor.numpy() for name, tensor in batch.items()}, protocol=5)

    return prepare


def _ours(folder: Path, shipping: Any) -> Callable[[bytes], bytes]:
    """A row as a worker process prepares it."""
    from pipeline.preparation import Preparation, PreparationOptions, Task
    from pipeline.prompt.template import PromptConfig
    from pipeline.records import EncodedSample, ImageRef, RecordKey, Row
    from pipeline.tensors.processor import ProcessorSource

    config = PromptConfig()
    preparation = Preparation(
        PreparationOptions(
            template=config.build(()),
            processor=ProcessorSource(str(folder), shipping=shipping),
            fingerprint="f",
            max_image_pixels=config.max_image_pixels,
            allow_urls=False,
            max_new_tokens=100,
            max_new_tokens_column=None,
        )
    )
    row = Row(index=0, id="a", images=(), columns={})

    def prepare(photo: bytes) -> bytes:
        task = Task(replace(row, images=(ImageRef(data=photo),)), (RecordKey(0, "default", 0),))
        samples = preparation(task)
        assert isinstance(samples[0], EncodedSample), samples[0]
        return pickle.dumps(samples, protocol=5)

    return prepare


def _device_half(message: bytes) -> dict[str, float]:
    """Seconds to make the tensors, by device and method."""
    import torch

    from pipeline.tensors.replay import PixelReplay
    from pipeline.tensors.resize import METHODS

    [sample] = pickle.loads(message)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {}
    for device in devices:
        for method in METHODS if sample.compact.recipe.steps else METHODS[:1]:
            replay = PixelReplay(device, method)
            seconds = []
            for _ in range(4):
                start = time.perf_counter() if device == "cuda" else time.process_time()
                made = replay.expand(sample)
                made["pixel_values"].flatten()[0].item()  # waits for the device
                seconds.append((time.perf_counter() if device == "cuda" else time.process_time()) - start)
            way = f"{device} {method}" if sample.compact.recipe.steps else device
            found[way] = statistics.median(seconds[1:])
    return found


# What is measured on -------------------------------------------------------------------------------------------------


def save_processor(folder: Path) -> None:
    """SmolVLM's way with images, and a tokenizer of single bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens=["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles],
    )
    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    transformers.Idefics3Processor(images, tokenizer, image_seq_len=64, chat_template=_TEMPLATE).save_pretrained(folder)


def jpeg(width: int, height: int, seed: int) -> bytes:
    """Smooth colours with noise, as large as a photo of that size."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = (smooth + random.normal(0, 6, smooth.shape).astype(np.int16)).clip(0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()

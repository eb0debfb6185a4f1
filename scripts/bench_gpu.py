"""Engines on a GPU with models of published size: python scripts/bench_gpu.py --model qwen2_5_vl_7b --output DIR

The model is built on the device with random weights, so no file is downloaded or written; each call takes one model and
ends within nine minutes. Sides get the same prompts, as the processor would give them, in the memory of the host, and
the same length for each answer; sides are one process, and what they measure ends with token ids.

    decode      64 rows: a decode step, and its share of the copy bandwidth measured in the same run
    requests    rows/s over a stream of requests, answers of 100 tokens on average, 256 at most, 64 at once

It needs torch, transformers and this checkout on PYTHONPATH. A side whose package is missing says so. Writes
DIR/engines_gpu_MODEL.json and .md. `--tiny --device cpu` goes the same way with a small model in seconds: it shows that
the program works and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from bench_ceiling import Ceiling, Shape, measured, shape_of
from bench_lengths import Workload, lengths
from gpu_models import circumstances
from gpu_shapes import PUBLISHED, TINY_SHAPES
from tokenizers import Tokenizer, models
from transformers.utils import is_flash_attn_2_available

from pipeline.records import EncodedSample
from pipeline.tensors.batch import Batcher
from pipeline.vlm.answer import Ending
from pipeline.vlm.generation import GenerationSettings
from pipeline.vlm.load import LoadedModel
from pipeline.vlm.options import SlotsConfig
from pipeline.vlm.sampling import Sampler
from pipeline.vlm.static import StaticEngine


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    num_slots: int
    load: Workload
    decode_tokens: int  # of each row where decode steps are timed
    rounds: int
    budget_seconds: float  # nothing new begins after so many


REAL = Sizes(64, Workload(256, 100, 256, variation=0.5), 65, 2, 480.0)
SMALL = Sizes(4, Workload(12, 6, 12), 5, 1, 100.0)


@dataclass(slots=True)
class Work:
    """What a side computed for some requests."""

    num_tokens: int
    num_decode_steps: int
    num_decode_rows: int


# Answers all samples; counts what was computed.
Answering = Callable[[Sequence[EncodedSample]], Work]


class NotHere(Exception):
    """A side cannot run here; the message says why."""


class NeverStop:
    """Nobody asks the engine to stop."""

    requested = expired = False


def padded(model: Any, num_slots: int, attention: str) -> Answering:
    """transformers' generate() over padded batches in the order of the requests; each row ends at its own length."""
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise NotHere("flash-attn is not installed, or does not fit this device")

    def answer(samples: Sequence[EncodedSample]) -> Work:
        model.set_attn_implementation(attention)
        work = Work(0, 0, 0)
        for start in range(0, len(samples), num_slots):
            group = samples[start : start + num_slots]
            caps_B = torch.tensor([sample.max_new_tokens or 1 for sample in group], device=model.device)
            batch = {name: moved(tensor, model) for name, tensor in batcher(1).collate(group).items()}
            width = batch["input_ids"].shape[1]
            longest = int(caps_B.max())
            settings = transformers.GenerationConfig(
                max_new_tokens=longest, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True
            )
            criteria = transformers.StoppingCriteriaList([Caps(caps_B, width)])
            tokens_BT = model.generate(**batch, generation_config=settings, stopping_criteria=criteria)
            num_steps = tokens_BT.shape[1] - width - 1
            work.num_tokens += int(caps_B.sum())
            work.num_decode_steps += num_steps
            work.num_decode_rows += num_steps * len(group)
        return work

    return answer


class Caps(transformers.StoppingCriteria):  # type: ignore[misc]
    """A row is done when it has its length; the batch when all rows are."""

    def __init__(self, caps_B: torch.Tensor, width: int) -> None:
        self._caps_B, self._width = caps_B, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self._caps_B <= input_ids.shape[1] - self._width


def moved(tensor: torch.Tensor, model: Any) -> torch.Tensor:
    tensor = tensor.to(model.device)
    return tensor.to(model.dtype) if tensor.is_floating_point() else tensor


def batcher(max_rows: int) -> Batcher:
    return Batcher(max_rows=max_rows, max_tokens=1 << 30, max_new_tokens=1)


def ours(model: Any, num_slots: int, name: str, **options: Any) -> Answering:
    """One of our engines: greedy, every answer to its full length."""
    vocabulary = {f"w{number}": number for number in range(model.config.get_text_config().vocab_size)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
    )
    loaded = LoadedModel(model, tokenizer, model.device, (2,), 0, is_encoder_decoder=False)
    parts: dict[str, Any] = {
        "loaded": loaded,
        "batcher": batcher(num_slots),
        "sampler": Sampler(GenerationSettings().sampling, 0),
        "ending": Ending(tokenizer, eos_ids=(2,), stop=(), ignore_eos=True),
        "settings": GenerationSettings(),
        "max_new_tokens": 1,
        "stop": NeverStop(),
    }
    engine: Any = StaticEngine(**parts)
    if name == "slots":
        from pipeline.vlm.slots.engine import SlotsEngine

        known = {option for option in options if option in SlotsConfig.__dataclass_fields__}
        if unknown := options.keys() - known:
            raise NotHere(f"this version has no engine.{sorted(unknown)[0]}")
        engine = SlotsEngine(**parts, static=engine, options=SlotsConfig(max_batch_rows=num_slots, **options))

    def answer(samples: Sequence[EncodedSample]) -> Work:
        before = replace(engine.counts)
        found = list(engine.answers(iter(samples)))
        caps = {sample.key: sample.max_new_tokens for sample in samples}
        wrong = [each for each in found if each.fault or each.num_generated_tokens != caps[each.key]]
        if wrong or len(found) != len(samples):
            raise RuntimeError(f"{len(samples)} rows, {len(found)} answers, of which wrong: {wrong[:1]}")
        if name == "slots" and engine.numerics["engine"] != "slots":
            raise RuntimeError("the slots engine stepped back to padded batches; its log says why")
        return Work(
            sum(each.num_generated_tokens or 0 for each in found),
            engine.counts.num_decode_steps - before.num_decode_steps,
            engine.counts.num_decode_rows - before.num_decode_rows,
        )

    return answer


# One line adds or removes a side. The model that slots get is one of its own: the engine may rebuild its layers.
Making = Callable[[Any, int], Answering]
SIDES: dict[str, tuple[str, Making]] = {
    "padded generate, sdpa": ("plain", lambda model, slots: padded(model, slots, "sdpa")),
    "padded generate, flash_attention_2": ("plain", lambda model, slots: padded(model, slots, "flash_attention_2")),
    "ours: static": ("plain", lambda model, slots: ours(model, slots, "static")),
    "ours: slots": ("slots", lambda model, slots: ours(model, slots, "slots")),
    "ours: slots, again": ("slots", lambda model, slots: ours(model, slots, "slots")),
}


@dataclass(slots=True)
class Found:
    """What is known of a side."""

    absent: str = ""
    warming_seconds: float = 0.0
    step_seconds: list[float] | None = None
    work_seconds: list[float] | None = None
    work: Work | None = None
    peak_bytes: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(PUBLISHED), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model of the same architecture")
    parser.add_argument("--side", action="append", help="only sides with this in their name; may be given again")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured and nothing written (--tiny --device cpu goes without)")
        return 2
    started = time.perf_counter()
    sizes = SMALL if args.tiny else REAL
    shape = (TINY_SHAPES if args.tiny else PUBLISHED)[args.model]
    args.output.mkdir(parents=True, exist_ok=True)
    dtypes = ("bfloat16",) if args.device == "cuda" else ("bfloat16", "float32")
    ceiling = measured(args.device, dtypes, seconds=0.02 if args.tiny else 2.0)
    samples = shape.samples(lengths(sizes.load))
    found = {name: Found() for name in SIDES if not args.side or any(part in name for part in args.side)}
    report: dict[str, Any] = {
        "model": ("a tiny relative of " if args.tiny else "") + shape.name,
        "circumstances": circumstances(args.device),
        "ceiling": asdict(ceiling),
        "sizes": asdict(sizes),
        "num_prompt_tokens": statistics.mean(sample.num_tokens for sample in samples),
    }
    for group in dict.fromkeys(SIDES[name][0] for name in found):
        begun = time.perf_counter()
        model = shape.built(args.device)
        synchronize(args.device)
        report.setdefault("building_seconds", time.perf_counter() - begun)
        report["parameters"] = model.num_parameters()
        report["shape"] = asdict(shape_of(model, num_patches=0, num_image_tokens=0))
        members = {name: SIDES[name][1] for name in found if SIDES[name][0] == group}
        for name, answering in made(members, model, sizes, found).items():
            if time.perf_counter() - started > sizes.budget_seconds:
                found[name].absent = f"no time was left after {sizes.budget_seconds:.0f} s"
                continue
            with torch.inference_mode():
                take(found[name], answering, samples, sizes, args.device, started)
            said = found[name].absent or "measured"
            print(f"{time.perf_counter() - started:6.1f} s  {name}: {said}", file=sys.stderr, flush=True)
            report["sides"] = {key: asdict(each) for key, each in found.items()}
            report["seconds"] = time.perf_counter() - started
            stem = args.output / f"engines_gpu_{args.model}"
            stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
            stem.with_suffix(".md").write_text(page(report, found, samples, Shape(**report["shape"]), ceiling, sizes))
        del model
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(stem.with_suffix(".md").read_text())
    return 1 if any(each.absent.startswith("failed") for each in found.values()) else 0


def made(members: dict[str, Making], model: Any, sizes: Sizes, found: dict[str, Found]) -> dict[str, Answering]:
    """The sides of a group that can run."""
    ready = {}
    for name, make in members.items():
        try:
            ready[name] = make(model, sizes.num_slots)
        except (NotHere, ImportError) as reason:
            found[name].absent = str(reason)
    return ready


def take(
    found: Found, answer: Answering, samples: Sequence[EncodedSample], sizes: Sizes, device: str, started: float
) -> None:
    """Measure one side; what fails is said, and the others go on."""
    rows = samples[: sizes.num_slots]

    def seconds(of: Sequence[EncodedSample]) -> tuple[float, Work]:
        synchronize(device)
        began = time.perf_counter()
        work = answer(of)
        synchronize(device)
        return time.perf_counter() - began, work

    try:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        # Everything that is done once: kernels chosen, graphs captured, the engine's own trial of the model.
        found.warming_seconds = seconds(capped(rows, 4))[0] + seconds(capped(rows, sizes.decode_tokens))[0]
        steps: list[float] = []
        work_seconds: list[float] = []
        for _ in range(sizes.rounds):
            first, last = seconds(capped(rows, 1))[0], seconds(capped(rows, sizes.decode_tokens))[0]
            steps.append((last - first) / (sizes.decode_tokens - 1))
            if time.perf_counter() - started > sizes.budget_seconds and work_seconds:
                break
            took, found.work = seconds(samples)
            work_seconds.append(took)
        found.step_seconds, found.work_seconds = steps, work_seconds
        if device == "cuda":
            found.peak_bytes = torch.cuda.max_memory_allocated()
    except Exception as problem:  # a side may fail in any way: the others are worth having
        found.absent = f"failed: {type(problem).__name__}: {str(problem).splitlines()[0][:200]}"


def capped(samples: Sequence[EncodedSample], max_new_tokens: int) -> list[EncodedSample]:
    """The same prompts with answers of one length."""
    return [replace(sample, max_new_tokens=max_new_tokens) for sample in samples]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def step_bytes(samples: Sequence[EncodedSample], shape: Shape, sizes: Sizes) -> float:
    """What a decode step has to read: all weights of the decoder, and each live key and value, half way through."""
    rows = samples[: sizes.num_slots]
    live = sum(sample.num_tokens + sizes.decode_tokens / 2 for sample in rows)
    return shape.decoder_parameters * shape.weight_bytes + live * shape.kv_bytes


def page(
    report: dict[str, Any],
    found: dict[str, Found],
    samples: Sequence[EncodedSample],
    shape: Shape,
    ceiling: Ceiling,
    sizes: Sizes,
) -> str:
    """The report as Markdown."""
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s {dtype}" for dtype, rate in ceiling.flops_per_second.items())
    needed = step_bytes(samples, shape, sizes)
    head = ["side", "decode step, ms", "of the bandwidth", "rows/s", "least .. most", "tokens/s", "decode steps"]
    head += ["x ideal", "warm-up, s", "peak GiB"]
    rows = list(_rows(found, samples, needed, ceiling, sizes))
    return "\n".join(
        [
            f"# {report['model']}: engines on {report['circumstances']['device']}",
            "",
            "What `make bench-gpu` measured. Weights are random; every side gets the same prompts and lengths of",
            "answers, as tensors in the host's memory. A decode step is timed as the difference of long and short",
            f"answers of {sizes.num_slots} rows; its share of the bandwidth counts the decoder's weights and the live",
            f"keys and values once, {needed / 1e9:.3g} GB. Ideal steps are (tokens - rows) / {sizes.num_slots}.",
            "",
            *(f"- {name}: {value}" for name, value in report["circumstances"].items()),
            f"- parameters: {report['parameters'] / 1e9:.2f} billion, bfloat16; prompts of "
            f"{report['num_prompt_tokens']:.0f} tokens on average; {len(samples)} requests, answers of "
            f"{statistics.mean(sample.max_new_tokens or 0 for sample in samples):.0f} tokens on average",
            f"- ceilings in this run: copy {ceiling.bytes_per_second / 1e12:.3g} TB/s, {rates}",
            "",
            f"| {' | '.join(head)} |",
            f"| --- |{' ---: |' * (len(head) - 1)}",
            *rows,
            "",
            "Not claimed: anything about the time to decode and resize pictures, about other lengths, or about the",
            "text of the answers.",
            "",
        ]
    )


def _rows(
    found: dict[str, Found], samples: Sequence[EncodedSample], needed: float, ceiling: Ceiling, sizes: Sizes
) -> Iterator[str]:
    num_columns = 10
    for name, each in found.items():
        if not each.work_seconds or not each.step_seconds or each.work is None:
            cells = [name, f"not measured: {each.absent or 'not yet'}", *[""] * (num_columns - 2)]
        else:
            step, work = statistics.median(each.step_seconds), each.work
            speeds = [len(samples) / seconds for seconds in each.work_seconds]
            ideal = (work.num_tokens - len(samples)) / sizes.num_slots
            cells = [
                name,
                f"{1000 * step:.2f}",
                f"{needed / step / ceiling.bytes_per_second:.0%}",
                f"{statistics.median(speeds):.2f}",
                f"{min(speeds):.2f} .. {max(speeds):.2f}",
                f"{work.num_tokens / statistics.median(each.work_seconds):,.0f}",
                f"{work.num_decode_steps:,}",
                f"{work.num_decode_steps / ideal:.2f}",
                f"{each.warming_seconds:.1f}",
                f"{each.peak_bytes / 2**30:.1f}" if each.peak_bytes else "",
            ]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())

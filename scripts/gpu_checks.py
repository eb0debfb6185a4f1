"""The checks of the GPU suite. Each takes the subject and gives a table; what cannot run here says what it lacks.

Every check takes its sizes from the subject, so that a tiny one on a CPU goes the same way in seconds.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_measures import Side, attention, difference, num_bytes, speed
from gpu_subject import Subject, prompts
from PIL import Image

from pipeline.records import EncodedSample, PromptFacts, RecordKey
from pipeline.tensors.processor import Processor, ProcessorSource
from pipeline.vlm.identity import identify
from pipeline.vlm.load import LoadedModel, load_model
from pipeline.vlm.options import Attention, DeviceMap, Dtype, Quantization, VlmConfig

TESTS = Path(__file__).resolve().parents[1] / "tests"
BOUND = 1e-5  # of the largest logit, in float32

Table = list[dict[str, Any]]


class NotMeasured(Exception):
    """A check cannot run here; the message says why."""


class Missed(Exception):
    """A check ran and did not find what it has to; the table shows what it found."""

    def __init__(self, message: str, table: Table) -> None:
        super().__init__(message)
        self.table = table


def building(subject: Subject) -> Table:
    """The model made on the device, saved, and loaded as a run loads it."""
    with loaded(subject) as model:
        return [
            {
                "parameters, billions": subject.num_parameters / 1e9,
                "weights, GB": num_bytes(model) / 1e9,
                "made on the device, s": subject.making_seconds,
                "saved, s": subject.saving_seconds,
                "attention": model.numerics["attention"],
                "dtype": model.numerics["dtype"],
            }
        ]


def generation(subject: Subject) -> Table:
    """A batch of 16 through the engine with SDPA: equal prompts, and ragged ones with padding."""
    with loaded(subject, attn_implementation=Attention.sdpa) as model:
        return [
            {"prompts": name} | speed(subject, {name: model}, prompts(subject.sizes, ragged=ragged))[name]
            for name, ragged in (("of one length", False), ("ragged, padded", True))
        ]


def kernels(subject: Subject) -> Table:
    """Which attention kernel runs, by the profiler: SDPA's flash kernel for prompts of one length."""
    with loaded(subject, attn_implementation=Attention.sdpa) as model:
        table = [
            {"prefill": name} | attention(model, prompts(subject.sizes, ragged=ragged, pictures=pictures))
            for name, ragged, pictures in (
                ("text of one length (the language model alone)", False, False),
                ("text of different lengths, padded", True, False),
                ("pictures and text of one length", False, True),
                ("pictures and text, ragged, padded", True, True),
            )
        ]
    if not table[0]["flash"]:
        raise Missed("the flash kernel of SDPA did not run for prompts of one length", table)
    return table


def flash_packages(subject: Subject) -> Table:
    """The same batch through a flash attention package."""
    # Both are imported as flash_attn, so the name of the distribution tells them apart.
    packages = {Attention.flash_attention_2: "flash-attn", Attention.flash_attention_4: "flash-attn-4"}
    table: Table = []
    for kernel, package in packages.items():
        if subject.device != "cuda" or not _is_installed(package):
            why = f"{package} needs a CUDA device" if _is_installed(package) else f"{package} is not installed"
            table.append({"attention": kernel.value, "outcome": f"not measured: {why}"})
            continue
        with loaded(subject, attn_implementation=kernel) as model:
            samples = prompts(subject.sizes, ragged=True)
            found = speed(subject, {"": model}, samples)[""] | attention(model, samples)
        said = "executed" if found["flash"] else "loaded, but its kernel did not run"
        table.append({"attention": kernel.value, "outcome": said} | found)
    if any(row["outcome"].startswith("loaded") for row in table):
        raise Missed("a flash attention package did not run its kernel", table)
    if not any(row["outcome"] == "executed" for row in table):
        raise NotMeasured("; ".join(row["outcome"].removeprefix("not measured: ") for row in table))
    return table


def int8(subject: Subject) -> Table:
    """Quanto's int8 against bfloat16, turn about: what the weights are stored in, and time."""
    if not _is_importable("optimum.quanto"):
        raise NotMeasured("optimum-quanto is not installed")
    samples = prompts(subject.sizes, ragged=True)
    with loaded(subject) as plain, loaded(subject, quantization=Quantization.int8) as quantized:
        sides = {"bfloat16": plain, "int8 (Quanto)": quantized}
        times = speed(subject, sides, samples)
        table: Table = [
            {"format": name, "weights, GB": num_bytes(model) / 1e9} | times[name] for name, model in sides.items()
        ]
    if not table[1]["weights, GB"] < table[0]["weights, GB"]:
        raise Missed("int8 does not take less memory", table)
    return table


def device_map(subject: Subject) -> Table:
    """device_map=auto places the model and gives the same answers as one device."""
    samples = prompts(subject.sizes, ragged=True)
    max_new_tokens = subject.sizes.max_new_tokens
    with loaded(subject) as model:
        before = {row.id: row.response for row in Side(model, samples).answers(samples, max_new_tokens)}
    with loaded(subject, device_map=DeviceMap.auto) as model:
        after = {row.id: row.response for row in Side(model, samples).answers(samples, max_new_tokens)}
        places = sorted({str(weight.device) for weight in model.model.parameters()})
    same = sum(before[name] == after[name] for name in before)
    table: Table = [{"devices": ", ".join(places), "answers equal to those without": f"{same} of {len(before)}"}]
    if same != len(before) and len(places) == 1:  # another order of sums on several devices may turn a bfloat16 answer
        raise Missed("answers differ from those without device_map", table)
    return table


def parity(subject: Subject) -> Table:
    """Logits of a ragged batch against each row alone, bfloat16, at this size: what there is, without a bound."""
    with loaded(subject) as model:
        return [{"model": subject.sizes.name} | difference(model, prompts(subject.sizes, ragged=True))]


def architectures(subject: Subject) -> Table:
    """Tiny models of every architecture in float32: logits of a ragged batch against rows alone, within 1e-5."""
    _find_tiny_checkpoints()
    from tiny_checkpoints import ARCHITECTURES

    table: Table = []
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory(prefix=f"gpu-models-{name}-") as folder:
            try:
                found = architecture(name, Path(folder), subject.device)
            except ImportError as problem:
                found = {"outcome": f"not measured: {str(problem).strip().splitlines()[0][:160]}"}
            except Exception as problem:  # one architecture that cannot run must not hide the others
                found = {"outcome": f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:160]}"}
        table.append({"architecture": name} | found)
    wrong = [row["architecture"] for row in table if not row["outcome"].startswith(("passed", "not measured"))]
    if wrong:
        raise Missed(f"{len(wrong)} of {len(table)} architectures: {', '.join(wrong)}", table)
    return table


def architecture(name: str, folder: Path, device: str) -> dict[str, Any]:
    """A tiny checkpoint in this folder through processor, loader and engine."""
    _find_tiny_checkpoints()
    from tiny_checkpoints import ARCHITECTURES, save

    if missing := [package for package in ARCHITECTURES[name].packages if not _is_importable(package)]:
        return {"outcome": f"not measured: {', '.join(missing)} is not installed"}
    save(name, folder)
    plain = ARCHITECTURES[name].plain
    processor = Processor(ProcessorSource(folder=str(folder), plain=plain is not None))
    samples = []
    for number in range(8):
        question = "What is this?" + " Say more." * number
        text = question if plain is None else plain.format(question=question)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        picture = Image.effect_noise((40 + 8 * number, 90 - 7 * number), 60).convert("RGB")
        encoded = processor.encode([turn], [picture])
        samples.append(EncodedSample(RecordKey(number, "default", 0), f"row {number}", encoded.tensors, PromptFacts()))
    options = VlmConfig(path=str(folder), dtype=Dtype.float32, device=device)
    found = difference(load_model(options, identify(options), num_threads=1), samples)
    return {"outcome": "passed" if found["largest difference"] <= BOUND else "missed"} | found


CHECKS: dict[str, Callable[[Subject], Table]] = {
    "building": building,
    "generation": generation,
    "kernels": kernels,
    "flash_packages": flash_packages,
    "device_map": device_map,
    "parity": parity,
    "int8": int8,
    "architectures": architectures,
}


@contextmanager
def loaded(subject: Subject, **options: Any) -> Iterator[LoadedModel]:
    """A loaded model whose memory is free again afterwards."""
    model = subject.load(**options)
    try:
        yield model
    finally:
        del model
        gc.collect()
        if subject.device == "cuda":
            torch.cuda.empty_cache()


def _find_tiny_checkpoints() -> None:
    """Put what the ordinary tests build on the path."""
    if (folder := str(TESTS / "models")) not in sys.path:
        sys.path.insert(0, folder)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the parent package
        return False

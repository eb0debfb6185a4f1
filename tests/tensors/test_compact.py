"""Compact images: the same tensors, bit for bit, or none at all."""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_processors import (
    IDEFICS_TEMPLATE,
    clip_images,
    save_gemma3,
    save_idefics2,
    save_idefics3,
    save_llava,
    tokenizer,
)

from pipeline.preparation import Preparation
from pipeline.records import EncodedSample, PromptFacts, RecordKey
from pipeline.tensors import recording, resize
from pipeline.tensors.batch import Batcher
from pipeline.tensors.probe import question
from pipeline.tensors.processor import Encoded, Processor, ProcessorSource
from pipeline.tensors.proof import compact_flaw
from pipeline.tensors.replay import PixelReplay, same_bits
from pipeline.tensors.resize import METHODS, Method

GEMMA_TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<start_of_image>{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}model:{% endif %}"
)
# Width and height: as photos are, high, tiny, as large as a target, thin.
SIZES = [(80, 60), (50, 90), (7, 5), (56, 28), (28, 28), (3, 70)]


def save_tiles(folder: Path) -> Path:
    """Idefics3 as SmolVLM has it: cut into tiles, and the image as a whole."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places]
    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 16})
    transformers.Idefics3Processor(
        images, tokenizer(special), image_seq_len=4, chat_template=IDEFICS_TEMPLATE
    ).save_pretrained(folder)
    return folder


def save_five_tiles(folder: Path) -> Path:
    """Idefics2 with its image cut in four before it is resized."""
    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>"]
    images = transformers.Idefics2ImageProcessorPil(
        size={"longest_edge": 56, "shortest_edge": 28}, do_image_splitting=True
    )
    transformers.Idefics2Processor(
        images, tokenizer(special), image_seq_len=4, chat_template=IDEFICS_TEMPLATE
    ).save_pretrained(folder)
    return folder


def save_siglip(folder: Path, side: int = 28) -> Path:
    images = transformers.SiglipImageProcessorPil(size={"height": side, "width": side})
    transformers.LlavaProcessor(
        images, tokenizer(["<image>", "<end_of_utterance>"]), patch_size=7, chat_template=IDEFICS_TEMPLATE
    ).save_pretrained(folder)
    return folder


def save_unresized(folder: Path) -> Path:
    """Center crop alone: the image's own pixels, and a border around small ones."""
    images = clip_images()
    images.do_resize = False
    transformers.LlavaProcessor(
        images, tokenizer(["<image>", "<end_of_utterance>"]), patch_size=7, chat_template=IDEFICS_TEMPLATE
    ).save_pretrained(folder)
    return folder


SAVES: dict[str, Callable[[Path], Path]] = {
    "idefics2": save_idefics2,
    "idefics2, cut in four": save_five_tiles,
    "idefics3": save_idefics3,
    "idefics3, tiles": save_tiles,
    "llava": save_llava,
    "siglip": save_siglip,
    "gemma3": lambda folder: save_gemma3(folder, GEMMA_TEMPLATE),
    "crop": save_unresized,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Processor]:
    return {
        name: Processor(ProcessorSource(str(save(tmp_path_factory.mktemp("processor")))))
        for name, save in SAVES.items()
    }


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def tensors(found: Encoded, method: Method = "taps") -> dict[str, torch.Tensor]:
    """All of them, after a journey between two processes."""
    found = pickle.loads(pickle.dumps(found))
    given = {name: torch.from_numpy(array) for name, array in found.tensors.items()}
    return given | (PixelReplay(method=method).tensors(found.compact) if found.compact else {})


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("shipping", ["decoded", "resized"])
@pytest.mark.parametrize("name", SAVES)
def test_tensors_are_the_processors_in_every_bit(
    processors: dict[str, Processor], name: str, shipping: Any, num_images: int
) -> None:
    processor = processors[name]
    rows = [[noise(*size, seed=number), noise(*SIZES[0])][:num_images] for number, size in enumerate(SIZES)]
    processor.ship("processed")
    truths = [processor.encode(question(num_images), images) for images in rows]
    processor.ship(shipping, at_once=True)
    num_compact = 0
    for number, (images, truth) in enumerate(zip(rows, truths, strict=True)):
        found = processor.encode(question(num_images), images)
        assert same_bits(tensors(found, METHODS[number % len(METHODS)]), tensors(truth)), images[0].size
        assert found.image_key == truth.image_key
        assert len(pickle.dumps(found)) < len(pickle.dumps(truth)) + 8_000  # of recipe
        num_compact += found.compact is not None
    assert num_compact > 1, processor.ship("processed")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SAVES)
def test_nothing_speaks_against_these_processors(processors: dict[str, Processor], name: str, method: Method) -> None:
    assert compact_flaw(processors[name], PixelReplay(method=method)) is None


def test_images_of_new_sizes_need_no_new_pattern(
    processors: dict[str, Processor], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = processors["idefics3, tiles"]
    recorded = []
    own = recording.Recorder._pattern
    monkeypatch.setattr(
        recording.Recorder, "_pattern", lambda self, call, *rest: recorded.append(call) or own(self, call, *rest)
    )
    processor.ship("decoded", at_once=True)
    for width in range(60, 84):
        assert processor.encode(question(1), [noise(width, 47)]).compact is not None
    assert len(recorded) <= 3  # one for each number of resizes: some sizes are right after the first or the second


def test_a_recipe_is_looked_for_when_images_of_a_kind_have_become_frequent(processors: dict[str, Processor]) -> None:
    processor = processors["llava"]
    processor.ship("decoded")
    found = [processor.encode(question(1), [noise(60, 40, seed)]).compact is not None for seed in range(6)]
    assert found == [False, False, False, True, True, True]


def test_large_pictures_that_become_small_are_resized_before_they_travel(processors: dict[str, Processor]) -> None:
    processor = processors["llava"]
    processor.ship("decoded", at_once=True)
    small, large = (processor.encode(question(1), [noise(*size)]).compact for size in ((40, 30), (800, 600)))
    assert small is not None and small.pixels[0].shape == (30, 40, 3)
    assert large is not None and large.pixels[0].shape == (28, 37, 3)
    assert not large.recipe.steps


def test_the_engine_gets_the_sample_that_the_processor_alone_would_have_made(tmp_path: Path) -> None:
    from test_preparation import options_of, task

    options = options_of(save_idefics3(tmp_path))
    compact_options = replace(options, processor=replace(options.processor, shipping="decoded"))
    plain, compact = Preparation(options), Preparation(compact_options)
    rows = [task(png(noise(40, 30, seed))) for seed in range(5)]
    [truth, _], found = plain(rows[-1]), [compact(row)[0] for row in rows][-1]
    assert isinstance(truth, EncodedSample) and isinstance(found, EncodedSample)
    assert found.compact is not None
    assert "pixel_values" not in found.tensors
    expanded = PixelReplay().expanded(found)
    assert expanded.compact is None and expanded.image_key == truth.image_key
    assert expanded.tensors.keys() == truth.tensors.keys()
    assert all(np.array_equal(array, truth.tensors[name]) for name, array in expanded.tensors.items())
    assert {name: array.shape for name, array in expanded.tensors.items() if name in found.compact.shapes} == dict(
        found.compact.shapes
    )
    assert PixelReplay().expand(truth) == {}


@pytest.mark.parametrize("name", ["llava", "idefics3, tiles"])
def test_a_batch_of_compact_images_is_the_batch_of_their_tensors(processors: dict[str, Processor], name: str) -> None:
    """Images of several sizes: of those that are cut into tiles some have more, and the others are padded."""
    batches = {}
    for shipping in ("processed", "decoded"):
        processor, batcher = processors[name], Batcher(max_rows=4, max_tokens=10_000, max_new_tokens=4)
        batcher.replay = PixelReplay()
        processor.ship(shipping, at_once=True)  # type: ignore[arg-type]
        group = [
            EncodedSample(
                RecordKey(number, "default", 0), str(number), found.tensors, PromptFacts(), compact=found.compact
            )
            for number, size in enumerate(((40, 30), (30, 90), (64, 64)))
            if (found := processor.encode(question(1), [noise(*size, number)]))
        ]
        assert all((sample.compact is not None) == (shipping == "decoded") for sample in group)
        batches[shipping] = batcher.collate(group)
        shapes = {key: tensor.shape for key, tensor in batches[shipping].items()}
        stand_ins = batcher.collate(group, without=[key for key in shapes if key.startswith("pixel")])
        assert {key: tensor.shape for key, tensor in stand_ins.items()} == shapes
        assert not stand_ins["pixel_values"].any()
        assert stand_ins["pixel_values"].untyped_storage().nbytes() <= 4
    assert same_bits(batches["decoded"], batches["processed"])


def test_half_precision_is_the_rounded_float32(processors: dict[str, Processor]) -> None:
    processor = processors["llava"]
    processor.ship("decoded", at_once=True)
    compact = processor.encode(question(1), [noise(40, 30)]).compact
    assert compact is not None
    full, half = (PixelReplay().tensors(compact, dtype)["pixel_values"] for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(full.bfloat16(), half)


# What must not pass --------------------------------------------------------------------------------------------------


class Standardised(transformers.CLIPImageProcessorPil):
    """What a level becomes hangs on the whole picture, as with Pix2Struct."""

    def normalize(self, image: np.ndarray, *_: Any, **__: Any) -> np.ndarray:
        return (image - image.mean(dtype=np.float64)).astype(np.float32)


class Blurred(transformers.CLIPImageProcessorPil):
    """An average of two pixels."""

    def center_crop(self, image: np.ndarray, size: Any, **more: Any) -> np.ndarray:
        image = super().center_crop(image, size, **more)
        return ((image + np.roll(image, 1, axis=-1).astype(np.int64)) // 2).astype(np.uint8)


class Reduced(transformers.CLIPImageProcessorPil):
    """Pillow's resize in two steps."""

    def resize(self, image: np.ndarray, size: Any, resample: Any = None, **more: Any) -> np.ndarray:
        return super().resize(image, size, resample, reducing_gap=2.0)


class Wandering(transformers.CLIPImageProcessorPil):
    """Always as large after resizing, but cropped at a place that hangs on how large it was."""

    def resize(self, image: np.ndarray, *_: Any, **__: Any) -> np.ndarray:
        self.left = image.shape[-1] % 4
        return super().resize(image, transformers.image_utils.SizeDict(height=28, width=32))

    def center_crop(self, image: np.ndarray, *_: Any, **__: Any) -> np.ndarray:
        return image[:, :, self.left : self.left + 28]


def processor_around(images: Any, monkeypatch: pytest.MonkeyPatch, **source: Any) -> Processor:
    made = transformers.LlavaProcessor(
        images, tokenizer(["<image>", "<end_of_utterance>"]), patch_size=7, chat_template=IDEFICS_TEMPLATE
    )
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: made)
    return Processor(ProcessorSource("folder", **source))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Standardised, "equal levels become different values in pixel_values"),
        (Blurred, "pixel_values mixes pixels"),
        (Reduced, "in two steps"),
    ],
)
def test_a_processor_that_does_something_else_ships_its_own_tensors_and_the_log_says_why_once(
    kind: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    side = {"height": 28, "width": 28}
    processor = processor_around(kind(size={"shortest_edge": 28}, crop_size=side), monkeypatch)
    assert reason in str(compact_flaw(processor, PixelReplay()))
    truth = processor.encode(question(1), [noise(40, 30)])
    caplog.clear()
    caplog.set_level(logging.INFO, "pipeline")
    processor.ship("decoded", at_once=True)
    for size in ((40, 30), (50, 20), (60, 60)):
        found = processor.encode(question(1), [noise(*size)])
        assert found.compact is None and "pixel_values" in found.tensors
    assert same_bits(tensors(processor.encode(question(1), [noise(40, 30)])), tensors(truth))
    assert sum(reason in record.message for record in caplog.records) == 1


def test_an_image_processor_that_is_no_case_for_it_is_left_alone_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = []
    own = recording.traced
    monkeypatch.setattr(recording, "traced", lambda *args, **more: runs.append(1) or own(*args, **more))
    processor = processor_around(Reduced(), monkeypatch)
    processor.ship("decoded")
    for width in range(30, 50):
        processor.encode(question(1), [noise(width, 30)])
    assert len(runs) == recording._MAX_REFUSALS


def test_a_processor_that_goes_on_working_on_its_images_ships_its_own_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Doubled(transformers.LlavaProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            found = super().__call__(*args, **kwargs)
            if "pixel_values" in found:
                found["pixel_values"] = 2 * found["pixel_values"]
            return found

    monkeypatch.setattr(transformers, "LlavaProcessor", Doubled)
    processor = processor_around(clip_images(), monkeypatch)
    truth = processor.encode(question(1), [noise(40, 30)])
    processor.ship("decoded", at_once=True)
    assert same_bits(tensors(processor.encode(question(1), [noise(40, 30)])), tensors(truth))
    assert "goes on working" in str(compact_flaw(processor, PixelReplay()))


def test_a_pattern_is_not_taken_for_a_size_for_which_it_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = processor_around(Wandering(), monkeypatch)
    pictures = [noise(width, 30) for width in (40, 41, 42, 43, 44)]
    truths = [processor.encode(question(1), [picture]) for picture in pictures]
    processor.ship("decoded", at_once=True)
    for picture, truth in zip(pictures, truths, strict=True):
        found = processor.encode(question(1), [picture])
        assert found.compact is not None
        assert same_bits(tensors(found), tensors(truth))


def test_the_proof_notices_a_wrong_order_of_passes(
    processors: dict[str, Processor], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = recording.matched

    def flipped(*sizes: int) -> resize.Resize:
        found = own(*sizes)
        return replace(found, vertical_first=not found.vertical_first)

    monkeypatch.setattr(recording, "matched", flipped)
    assert "other tensors come out" in str(compact_flaw(processors["llava"], PixelReplay()))


def test_the_proof_notices_sums_in_plain_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor(ProcessorSource(str(save_siglip(tmp_path, 224))))  # it shows in 1 of 10,000 pixels

    def plain(pixels_CHW: torch.Tensor, dim: int, num_out: int, filter: int, _: Method) -> torch.Tensor:
        weights_OI = (resize._dense(pixels_CHW.shape[dim], num_out, filter, "cpu") / 2**22).float()
        total = resize._product(pixels_CHW.float(), weights_OI, dim)
        return total.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)

    monkeypatch.setattr(resize, "_pass", plain)
    assert "other tensors come out" in str(compact_flaw(processor, PixelReplay()))


def test_the_proof_notices_other_levels(processors: dict[str, Processor], monkeypatch: pytest.MonkeyPatch) -> None:
    own = recording.Recorder._final

    def nudged(self: recording.Recorder, *args: Any) -> np.ndarray:
        return np.nextafter(own(self, *args), np.float32(9))

    monkeypatch.setattr(recording.Recorder, "_final", nudged)
    assert "other tensors come out" in str(compact_flaw(processors["gemma3"], PixelReplay()))

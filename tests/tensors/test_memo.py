"""Several prompts about one image: its half of the processor runs once, and its tensors travel once."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from test_preparation import options_of, photo, task
from tiny_processors import save_idefics2, save_idefics3, save_llava, save_paligemma

from pipeline.preparation import Preparation
from pipeline.records import Answer, EncodedSample
from pipeline.tensors.probe import question
from pipeline.tensors.processor import Processor, ProcessorSource

SAVES = {"idefics2": save_idefics2, "idefics3": save_idefics3, "llava": save_llava, "paligemma": save_paligemma}
CLASSES = {
    "idefics2": transformers.Idefics2ImageProcessorPil,
    "idefics3": transformers.Idefics3ImageProcessorPil,
    "llava": transformers.CLIPImageProcessorPil,
    "paligemma": transformers.SiglipImageProcessorPil,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in SAVES.items()}


@pytest.fixture
def processor_of(folders: dict[str, Path]) -> Callable[[str], Processor]:
    return lambda name: Processor(ProcessorSource(str(folders[name]), plain=name == "paligemma"))


def noise(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(text: str, num_images: int = 1) -> list[dict[str, Any]]:
    [turn] = question(num_images)
    return [{**turn, "content": [*turn["content"][:-1], {"type": "text", "text": text}]}]


def counted(name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry with each run of the image processor."""
    runs: list[int] = []
    own = CLASSES[name].preprocess

    def preprocess(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(CLASSES[name], "preprocess", preprocess)
    return runs


@pytest.mark.parametrize("name", SAVES)
def test_several_prompts_get_what_each_alone_would_and_the_image_is_processed_once(
    processor_of: Callable[[str], Processor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, texts = noise(0), ["What?", "Where is it, and since when?", "Who"]
    alone = [processor_of(name).encode(asked(text), [image]) for text in texts]
    processor = processor_of(name)
    runs = counted(name, monkeypatch)
    together = [processor.encode(asked(text), [image]) for text in texts]
    assert len(runs) == 1
    for one, other in zip(alone, together, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        for key, array in one.tensors.items():
            assert array.dtype == other.tensors[key].dtype
            np.testing.assert_array_equal(array, other.tensors[key])
    assert len({found.image_key for found in alone + together}) == 1
    assert together[0].tensors["pixel_values"] is together[2].tensors["pixel_values"]


@pytest.mark.parametrize("name", SAVES)
def test_another_image_is_processed_anew(
    processor_of: Callable[[str], Processor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = processor_of(name)
    runs = counted(name, monkeypatch)
    found = [processor.encode(asked("What?"), [noise(seed)]) for seed in (0, 1, 0)]
    assert len(runs) == 3
    assert found[0].image_key == found[2].image_key != found[1].image_key
    assert not np.array_equal(found[0].tensors["pixel_values"], found[1].tensors["pixel_values"])


def test_an_image_of_equal_bytes_and_another_shape_has_another_key(processor_of: Callable[[str], Processor]) -> None:
    processor = processor_of("idefics3")
    grey = [Image.new("RGB", size, (7, 7, 7)) for size in ((40, 30), (30, 40))]
    assert len({processor.encode(asked("What?"), [image]).image_key for image in grey}) == 2
    both, turned = (processor.encode(asked("What?", 2), images).image_key for images in (grey, grey[::-1]))
    assert both != turned


def test_text_has_no_image_key(processor_of: Callable[[str], Processor]) -> None:
    processor = processor_of("idefics3")
    assert processor.encode(asked("What?"), [noise(0)]).image_key is not None
    assert processor.encode(asked("What?", 0), []).image_key is None


def test_the_image_processor_is_still_of_its_class(processor_of: Callable[[str], Processor], tmp_path: Path) -> None:
    processor = processor_of("llava")._processor
    assert isinstance(processor.image_processor, transformers.CLIPImageProcessorPil)
    assert type(processor.image_processor).__name__ == "CLIPImageProcessorPil"
    processor.save_pretrained(tmp_path)
    assert Processor(ProcessorSource(str(tmp_path))).encode(asked("What?"), [noise(0)]).num_image_tokens == 16


def test_arguments_that_cannot_be_compared_are_handed_through(processor_of: Callable[[str], Processor]) -> None:
    image_processor = processor_of("llava")._processor.image_processor
    pixels = np.asarray(noise(0))
    assert image_processor([pixels], return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)


def test_images_have_keys_where_the_image_processor_is_not_called_as_usual(
    processor_of: Callable[[str], Processor],
) -> None:
    processor = processor_of("llava")
    image_processor = processor._processor.image_processor
    image_processor.__class__ = type(image_processor)._watched_class
    keys = [processor.encode(asked("What?"), [noise(seed)]).image_key for seed in (0, 1, 0)]
    assert keys[0] == keys[2] != keys[1]


def test_at_most_one_rows_images_are_held(processor_of: Callable[[str], Processor]) -> None:
    processor = processor_of("llava")
    for seed in range(3):
        processor.encode(asked("What?"), [noise(seed)])
    assert processor._memo.last is not None
    assert np.array_equal(processor._memo.last.pixels[0], np.asarray(noise(2)))
    assert len(processor._memo.last.images) == 1


def test_eight_prompts_about_a_row_travel_as_one_image(folders: dict[str, Path]) -> None:
    names = [f"q{number}" for number in range(8)]
    options = options_of(folders["llava"], variants={name: f"Question {name}?" for name in names})
    prepare = Preparation(options)
    one, eight = (prepare(task(photo(80, 60), names=tuple(chosen))) for chosen in (names[:1], names))
    assert len(pickle.dumps(eight)) < len(pickle.dumps(one)) + 7 * 4_000
    image_bytes = 28 * 28 * 3 * 4
    assert len(pickle.dumps(one)) > image_bytes
    received: list[EncodedSample | Answer] = pickle.loads(pickle.dumps(eight))
    samples = [sample for sample in received if isinstance(sample, EncodedSample)]
    assert len(samples) == 16 and len({sample.image_key for sample in samples}) == 1
    assert len({id(sample.tensors["pixel_values"]) for sample in samples}) == 1

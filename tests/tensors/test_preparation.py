"""A row through a worker process: prompts, image and tensors within the memory that a worker may take."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_processors import save_idefics3

from pipeline.preparation import Preparation, PreparationOptions, Task
from pipeline.prompt.image import OpenedImage, decode_image
from pipeline.prompt.template import PromptConfig, PromptFormat
from pipeline.records import Answer, EncodedSample, Fault, ImageRef, RecordKey, Row, Stage
from pipeline.tensors.pool import WorkerPool
from pipeline.tensors.processor import ProcessorSource
from pipeline.vlm.options import StaticConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_idefics3(tmp_path_factory.mktemp("idefics3"))


def options_of(
    folder: Path, columns: tuple[str, ...] = (), max_tokens: int | None = None, plain: bool = False, **prompt: Any
) -> PreparationOptions:
    config = PromptConfig(**prompt)
    return PreparationOptions(
        template=config.build(columns),
        processor=ProcessorSource(str(folder), max_tokens=max_tokens, plain=plain),
        fingerprint="f",
        max_image_pixels=config.max_image_pixels,
        allow_urls=False,
        max_new_tokens=20,
        max_new_tokens_column="cap" if "cap" in columns else None,
    )


def task(data: bytes | None = None, names: tuple[str, ...] = ("default",), **more: Any) -> Task:
    images = () if data is None else (ImageRef(data=data),)
    row = Row(**({"index": 0, "id": "a", "images": images, "columns": {}} | more))
    return Task(row, tuple(RecordKey(0, name, number) for name in names for number in (0, 1)))


def photo(width: int, height: int) -> bytes:
    encoded = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(encoded, "JPEG")
    return encoded.getvalue()


def test_a_photo_of_48_megapixels_fits_the_default_memory_of_a_worker_and_a_tight_limit_is_an_error_row(
    folder: Path, tmp_path: Path
) -> None:
    """Fault 39: an image that needs more memory than a worker has is an error row; the next one is opened."""

    def pool(memory_bytes: int) -> WorkerPool[Task, list[EncodedSample | Answer]]:
        return WorkerPool(
            partial(Preparation, options_of(folder)),
            num_workers=1,
            task_seconds=60,
            memory_bytes=memory_bytes,
            max_waiting=4,
            preload=("pytest",),
        )

    (tmp_path / "small.jpg").write_bytes(photo(40, 30))  # reading it must not set aside what a file may have at most
    by_path = task(images=(ImageRef(path=str(tmp_path / "small.jpg")),))
    tasks = [task(photo(8000, 6000)), task(photo(40, 30)), by_path]
    with pool(StaticConfig().worker_memory_bytes) as usual, pool(200 << 20) as tight:
        found = [*usual.results(iter(tasks)), *tight.results(iter(tasks))]
    large, small, read, too_large, still_small, still_read = found
    assert isinstance(large, list)
    assert [type(result) for result in large] == [EncodedSample] * 2
    assert (large[0].facts.image_width, large[0].facts.image_height) == ((8000,), (6000,))
    assert isinstance(too_large, list)
    assert [result.fault.kind for result in too_large if isinstance(result, Answer) and result.fault] == [
        "MemoryError"
    ] * 2
    others = (*small, *read, *still_small, *still_read)  # type: ignore[misc]
    assert [type(result) for result in others] == [EncodedSample] * 8


def test_each_key_has_one_result_and_the_image_is_told(folder: Path) -> None:
    prepare = Preparation(options_of(folder, variants={"short": "What?", "long": "Describe it at length."}))
    results = prepare(task(photo(40, 30), names=("short", "long")))
    assert [(result.key.prompt_name, result.key.sample_index) for result in results] == [
        ("short", 0),
        ("short", 1),
        ("long", 0),
        ("long", 1),
    ]
    assert {result.facts.prompt for result in results} == {"What?", "Describe it at length."}
    assert {result.facts.image_width for result in results} == {(40,)}
    assert len({result.facts.row_key for result in results}) == 2


def test_a_plain_prompt_gives_the_model_the_users_tokens_and_a_row_none(folder: Path) -> None:
    prepare = Preparation(
        options_of(folder, ("q",), plain=True, user="<image>{{ q }}<end_of_utterance>", format=PromptFormat.plain)
    )
    [sample, _] = prepare(task(photo(40, 30), columns={"q": "<image>What?</s>"}))
    assert isinstance(sample, EncodedSample)
    assert prepare.processor.tokenizer.decode(sample.tensors["input_ids"][0]).endswith(
        "< image>What?< /s><end_of_utterance>"
    )
    assert (sample.facts.num_image_tokens, sample.facts.num_images) == (4, 1)
    assert sample.facts.warnings == ("text cleaned: ['</s>', '<image>'] are tokens of the model",)


def test_the_prompt_ends_with_the_start_of_the_answer(folder: Path) -> None:
    prepare = Preparation(options_of(folder, ("q",), assistant_prefix="I see {{ q }} "))
    [sample, _] = prepare(task(photo(40, 30), columns={"q": "two"}))
    assert isinstance(sample, EncodedSample)
    assert prepare.processor.tokenizer.decode(sample.tensors["input_ids"][0]).endswith("assistant:I see two ")
    assert sample.facts.prompt == "Describe this image."


def test_a_row_that_could_not_be_read_keeps_its_fault(folder: Path) -> None:
    fault = Fault(Stage.READ, "NullImage", "image is null")
    results = Preparation(options_of(folder))(task(fault=fault))
    assert [result.fault for result in results if isinstance(result, Answer)] == [fault] * 2


def test_an_image_that_cannot_be_decoded_keeps_what_is_known_of_the_row(folder: Path) -> None:
    [answer, _] = Preparation(options_of(folder))(task(b"no image"))
    assert isinstance(answer, Answer)
    assert answer.fault is not None
    assert answer.fault.stage is Stage.DECODE
    assert (answer.facts.prompt, answer.facts.num_images) == ("Describe this image.", 1)


@pytest.mark.parametrize(("cap", "room"), [(5, 5), (20, 20), (500, 20), ("5", 5), (5.0, 5), (None, 20)])
def test_the_cap_of_a_row_is_never_above_max_new_tokens(folder: Path, cap: object, room: int) -> None:
    [sample, _] = Preparation(options_of(folder, ("cap",)))(task(photo(40, 30), columns={"cap": cap}))
    assert isinstance(sample, EncodedSample)
    assert sample.max_new_tokens == room


@pytest.mark.parametrize("cap", [0, -1, "five", "", 5.5, True])
def test_a_cap_that_is_no_number_of_tokens_is_a_fault(folder: Path, cap: object) -> None:
    [answer, _] = Preparation(options_of(folder, ("cap",)))(task(photo(40, 30), columns={"cap": cap}))
    assert isinstance(answer, Answer)
    assert answer.fault is not None
    assert (answer.fault.stage, answer.fault.kind) == ("template", "TokenCap")


def test_an_answer_never_outgrows_the_context_of_the_model(folder: Path) -> None:
    """Fault 34: an answer may be as long as the prompt leaves room in the context; with no room, an error row."""
    [sample, _] = Preparation(options_of(folder))(task(photo(40, 30)))
    assert isinstance(sample, EncodedSample)
    tight = Preparation(options_of(folder, max_tokens=sample.num_tokens + 3))
    [sample, _] = tight(task(photo(40, 30)))
    assert isinstance(sample, EncodedSample)
    assert sample.max_new_tokens == 3
    [answer, _] = Preparation(options_of(folder, max_tokens=sample.num_tokens))(task(photo(40, 30)))
    assert isinstance(answer, Answer)
    assert answer.fault is not None
    assert answer.fault.kind == "PromptTooLong"


def test_rows_about_one_image_decode_it_once_and_are_what_each_is_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def counted(ref: ImageRef, data: bytes, *, max_image_pixels: int) -> OpenedImage:
        decoded.append(len(data))
        return decode_image(ref, data, max_image_pixels=max_image_pixels)

    monkeypatch.setattr("pipeline.preparation.decode_image", counted)
    path = tmp_path / "a.jpg"
    path.write_bytes(photo(40, 30))
    at_path = (ImageRef(path=str(path)),)
    options = options_of(folder)
    prepare = Preparation(options)

    def both(one: Task) -> tuple[int, Any]:
        """How often the row's image was decoded, and the row prepared like one alone."""
        before = len(decoded)
        found = prepare(one)
        num_decoded = len(decoded) - before
        alone = Preparation(options)(one)
        for result, expected in zip(found, alone, strict=True):
            assert (type(result), result.facts) == (type(expected), expected.facts)
            if isinstance(result, EncodedSample) and isinstance(expected, EncodedSample):
                assert result.tensors.keys() == expected.tensors.keys()
                for name, tensor in result.tensors.items():
                    assert (tensor == expected.tensors[name]).all(), name
        return num_decoded, found[0]

    assert both(task(images=at_path))[0] == 1
    assert both(task(photo(40, 30)))[0] == 0  # the same bytes, from elsewhere
    assert both(task(images=at_path))[0] == 0
    path.write_bytes(photo(50, 30))
    num_decoded, changed = both(task(images=at_path))
    assert (num_decoded, changed.facts.image_width) == (1, (50,))
    assert both(task(photo(40, 30)))[0] == 1  # of the row before alone
    path.write_bytes(b"no image")
    for _ in range(2):  # a fault is found anew
        num_decoded, fault = both(task(images=at_path))
        assert (num_decoded, fault.fault.kind) == (1, "UnidentifiedImageError")


def test_a_large_image_is_not_kept_for_the_next_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.preparation._KEPT_PIXELS", 40 * 30)
    prepare = Preparation(options_of(folder))
    for width, num_kept in ((40, 1), (41, 0)):
        prepare(task(photo(width, 30)))
        prepare._images.begin_row()
        assert len(prepare._images._decoded) == num_kept


def test_what_a_row_left_is_let_go_before_another_image_is_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Preparation(options_of(folder))
    num_kept: list[int] = []

    def watched(ref: ImageRef, data: bytes, *, max_image_pixels: int) -> OpenedImage:
        num_kept.append(len(prepare._images._decoded))
        return decode_image(ref, data, max_image_pixels=max_image_pixels)

    monkeypatch.setattr("pipeline.preparation.decode_image", watched)
    for width in (40, 41, 42):
        prepare(task(photo(width, 30)))
    assert num_kept == [0, 0, 0]


def test_images_that_are_kept_are_those_that_the_model_is_shown(folder: Path, tmp_path: Path) -> None:
    """Read once, whatever becomes of the file later; what is no picture is kept, too, and what is missing is null."""
    good, bad, gone = tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "gone.png"
    good.write_bytes(photo(30, 20))
    bad.write_bytes(b"no picture")
    preparation = Preparation(replace(options_of(folder), keep_images=True))
    for images, kept in [
        ((good,), (photo(30, 20),)),
        ((good, bad), (photo(30, 20), b"no picture")),
        ((gone, good), (None, None)),
        ((), ()),
    ]:
        refs = tuple(ImageRef(path=str(path)) for path in images)
        results = preparation(replace(task(), row=replace(task().row, images=refs)))
        assert [result.facts.image_bytes for result in results] == [kept, kept]
    assert Preparation(options_of(folder))(task(photo(30, 20)))[0].facts.image_bytes == ()

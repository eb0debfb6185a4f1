"""The demo model and its test set, which travel with the package: they load offline, are small, and are right."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

CHECKOUT = Path(__file__).resolve().parents[1]
MODEL = CHECKOUT / "pipeline" / "vlm" / "demo"
DATA = CHECKOUT / "pipeline" / "dataset" / "demo.parquet"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return pq.read_table(DATA).to_pylist()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32).eval()


def pictures(row: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(image["bytes"])) for image in row["images"]]


def question(row: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": content}]


@torch.inference_mode()
def ask(model: Any, processor: Any, rows: list[dict[str, Any]]) -> list[str]:
    texts = [processor.apply_chat_template(question(row), add_generation_prompt=True, tokenize=False) for row in rows]
    batch = processor(text=texts, images=[pictures(row) for row in rows], padding=True, return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=96)
    return processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_demo_answers_nearly_every_question_about_unseen_digits(model, processor, rows):
    rows = rows[:200]
    answers = [answer for start in (0, 100) for answer in ask(model, processor, rows[start : start + 100])]
    wrong = [
        (row["id"], row["answer"], answer) for row, answer in zip(rows, answers, strict=True) if answer != row["answer"]
    ]
    assert len(wrong) <= 0.03 * len(rows), wrong


def test_a_question_asked_alone_gets_the_answer_it_gets_in_a_batch(model, processor, rows):
    rows = rows[:12]
    assert {len(row["images"]) for row in rows} == {1, 2}
    assert [ask(model, processor, [row])[0] for row in rows] == ask(model, processor, rows)


def test_the_chat_template_takes_a_system_turn_several_turns_and_several_images(processor):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Read both."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "first: 1; second: 2"}]},
        {"role": "user", "content": [{"type": "text", "text": "Where are more digits?"}]},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nAnswer briefly.<end_of_utterance>\n"
        "<|im_start|>user\n<image><image>Read both.<end_of_utterance>\n"
        "<|im_start|>assistant\nfirst: 1; second: 2<end_of_utterance>\n"
        "<|im_start|>user\nWhere are more digits?<end_of_utterance>\n"
        "<|im_start|>assistant\n"
    )


def test_a_second_question_about_the_same_picture_is_answered(model, processor, rows):
    row = next(row for row in rows if row["task"] == "read" and len(row["answer"]) == 7)
    messages = [
        *question(row),
        {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
        {"role": "user", "content": [{"type": "text", "text": "What is the last digit?"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    batch = processor(text=[text], images=[pictures(row)], return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=8)
    assert processor.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True) == row["answer"][-1]


def test_every_image_costs_sixteen_image_tokens(model, processor, rows):
    row = next(row for row in rows if len(row["images"]) == 2)
    text = processor.apply_chat_template(question(row), add_generation_prompt=True, tokenize=False)
    batch = processor(text=[text], images=[pictures(row)], return_tensors="pt")
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 2 * 16
    assert batch["pixel_values"].shape == (1, 2, 3, 32, 32)


def test_generation_is_greedy_and_its_end_is_not_its_padding(model, processor):
    settings = model.generation_config
    assert not settings.do_sample
    assert settings.eos_token_id == processor.tokenizer.eos_token_id
    assert settings.pad_token_id == processor.tokenizer.pad_token_id
    assert settings.eos_token_id != settings.pad_token_id
    assert processor.tokenizer.padding_side == "left"


def test_the_tokenizer_gives_back_every_question_and_answer(processor, rows):
    for text in {row["answer"] for row in rows} | {row["question"] for row in rows} | {"Größe 12\u202fµm: 漢字?"}:
        assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_the_descriptions_are_sentences_of_ten_tokens_or_more(processor, rows):
    answers = [row["answer"] for row in rows if row["task"] == "describe"]
    assert all(answer.endswith(".") for answer in answers)
    assert min(len(processor.tokenizer(answer)["input_ids"]) for answer in answers) >= 10


def test_the_files_are_small_half_precision_and_no_pickles(model):
    assert (MODEL / "model.safetensors").stat().st_size <= 4_000_000
    assert DATA.stat().st_size <= 3_000_000
    assert 1_000_000 <= sum(weight.numel() for weight in model.parameters()) <= 2_000_000
    files = {path.name for path in MODEL.iterdir()}
    assert {"config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "README.md"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    header = (MODEL / "model.safetensors").read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert {entry["dtype"] for name, entry in names.items() if name != "__metadata__"} == {"F16"}


def test_the_test_set_has_a_thousand_rows_with_unique_ids(rows):
    assert len(rows) >= 1000
    assert len({row["id"] for row in rows}) == len(rows)
    assert set(rows[0]) == {"id", "images", "question", "answer", "task"}
    assert {len(row["images"]) for row in rows} == {1, 2}
    assert pq.ParquetFile(DATA).metadata.num_row_groups > 1


def test_the_datasets_library_sees_images(rows):
    import pyarrow as pa
    from datasets import Dataset, Features

    schema = pq.read_schema(DATA)
    features = Features.from_arrow_schema(schema)
    assert str(features["images"]) == "List(Image(mode=None, decode=True))"
    head = Dataset(pa.Table.from_pylist(rows[:1], schema=schema))
    assert isinstance(head[0]["images"][0], Image.Image)


def demo_digits(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(CHECKOUT / "scripts"))
    for name in ("demo_digits", "make_demo_data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("demo_digits"), importlib.import_module("make_demo_data")


def test_no_test_digit_is_among_the_training_digits(monkeypatch):
    digits, _ = demo_digits(monkeypatch)
    train, test = digits.load_digits()
    assert set(train.positions.tolist()).isdisjoint(test.positions.tolist())
    assert len(train.positions) + len(test.positions) == 1797
    assert {image.tobytes() for image in train.images}.isdisjoint(image.tobytes() for image in test.images)


def test_the_test_set_is_what_the_script_makes(monkeypatch, rows):
    digits, data = demo_digits(monkeypatch)
    made = data.make_table(data.test_examples(digits.load_digits()[1])).to_pylist()
    assert [(row["question"], row["answer"]) for row in made] == [(row["question"], row["answer"]) for row in rows]
    assert [one.tobytes() for row in made for one in pictures(row)] == [
        one.tobytes() for row in rows for one in pictures(row)
    ]

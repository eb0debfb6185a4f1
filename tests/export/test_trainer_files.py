"""format=llava, openai, webdataset: what trainers and clients read."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from answered_run import FAULT, answered_run, manifest, picture, pictures
from small_run import tree
from webdataset.tariterators import group_by_keys, tar_file_iterator

from pipeline.dataset.webdataset import WebdatasetConfig
from pipeline.errors import UsageError
from pipeline.export.formats import exported
from pipeline.export.options import Errors, Exists, ExportOptions, Format
from pipeline.export.selection import Selection
from pipeline.prompt.image import image_bytes
from pipeline.records import Fault, FinishReason, RecordKey, Row, Stage
from pipeline.write.schema import WriteConfig


def export(output_dir: Path, format: Format, **words: Any) -> Selection:
    return exported(output_dir, ExportOptions(format=format, **words))[0]


def several(row: Row, key: RecordKey) -> str | Fault:
    """A second sample of the first row fails, and both samples of the second row's long prompt."""
    if (key.row_index, key.sample_index) == (0, 1) or (key.row_index, key.prompt_name) == (1, "long"):
        return Fault(Stage.GENERATE, "OutOfMemoryError", "no room")
    return f"{row.id} {key.prompt_name} {key.sample_index}"


# LLaVA


def test_llava_conversations_name_the_images_where_they_are(tmp_path: Path) -> None:
    answered_run(tmp_path / "run", pictures(tmp_path / "pictures", "a.jpg", "deep/b c.png"))
    export(tmp_path / "run", Format.llava)
    found = json.loads((tmp_path / "run/export/llava.json").read_text())
    assert found[1] == {
        "id": "deep/b c.png",
        "image": "deep/b c.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "deep/b c.png is a picture"},
        ],
    }
    assert len(found) == 2 and (tmp_path / "pictures" / found[0]["image"]).is_file()


def test_llava_of_several_records_and_images(tmp_path: Path) -> None:
    pictures(tmp_path / "source", "a.png", "b.png", "c.png")
    rows = [{"pics": ["a.png", "b.png"]}, {"pics": "c.png"}]
    source = manifest(tmp_path / "source", rows, image_column="pics")
    answered_run(tmp_path / "run", source, several, prompt_names=("short", "long"), num_samples=2)
    done = export(tmp_path / "run", Format.llava)
    found = json.loads((tmp_path / "run/export/llava.json").read_text())
    assert [(entry["id"], entry["image"]) for entry in found] == [
        ("0/short/0", ["a.png", "b.png"]),
        ("0/long/0", ["a.png", "b.png"]),
        ("1/short/0", "c.png"),
        ("1/short/1", "c.png"),
    ]
    assert found[0]["conversations"][0]["value"] == "<image>\n<image>\nWhat is it?"
    assert done.left_out == {"error generate/OutOfMemoryError": 4}


def test_llava_copies_images_that_are_no_files(tmp_path: Path) -> None:
    answered_run(tmp_path / "first", pictures(tmp_path / "pictures", "a.png", "b.jpg"))
    export(tmp_path / "first", Format.webdataset, to=str(tmp_path / "tars"))
    source = WebdatasetConfig(path=str(tmp_path / "tars"))
    answered_run(tmp_path / "run", source, write=WriteConfig(prefix="vlm_"), prompt_names=("p", "q"))
    with pytest.raises(UsageError, match="copy_images=true"):
        export(tmp_path / "run", Format.llava, prompt_name="q")
    assert list((tmp_path / "run/export").iterdir()) == []
    export(tmp_path / "run", Format.llava, copy_images=True, to=str(tmp_path / "out/train.json"))
    found = json.loads((tmp_path / "out/train.json").read_text())
    names = [entry["image"] for entry in found]
    assert names == [f"train_images/00000000{row}_0.{kind}" for row, kind in ((0, "png"), (1, "jpg")) for _ in "pq"]
    assert (tmp_path / "out" / names[0]).read_bytes() == picture(0)


def test_llava_leaves_out_what_a_trainer_would_take_for_one_more_image(tmp_path: Path) -> None:
    source = pictures(tmp_path / "pictures", "a.png", "b.png")
    answered_run(tmp_path / "run", source, lambda row, key: "an <image> tag" if row.index == 0 else "a cat")
    done = export(tmp_path / "run", Format.llava, to=str(tmp_path / "x.json"))
    assert [entry["id"] for entry in json.loads((tmp_path / "x.json").read_text())] == ["b.png"]
    assert done.left_out == {"with <image> in their words": 1}


def test_llava_of_nothing_is_an_empty_list(tmp_path: Path) -> None:
    answered_run(tmp_path / "run", pictures(tmp_path / "pictures", "a.png"), lambda row, key: FAULT)
    export(tmp_path / "run", Format.llava, to=str(tmp_path / "x.json"))
    assert json.loads((tmp_path / "x.json").read_text()) == []


# OpenAI


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_openai_lines_are_those_of_a_batch(tmp_path: Path) -> None:
    source = pictures(tmp_path / "pictures", "a.png", "b.png")
    answered_run(
        tmp_path / "run", source, lambda row, key: FAULT if row.index else "a cat", finish=FinishReason.REPETITION
    )
    done = export(tmp_path / "run", Format.openai)
    good, bad = lines(tmp_path / "run/export/openai.jsonl")
    body = good["response"]["body"]
    assert good["custom_id"] == "a.png" and good["error"] is None and good["response"]["status_code"] == 200
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "a cat", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",  # clients know no "repetition"
        }
    ]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert body["object"] == "chat.completion" and isinstance(body["created"], int)
    assert bad["custom_id"] == "b.png" and bad["response"] is None
    assert bad["error"] == {"code": "decode/UnidentifiedImageError", "message": "it is no picture"}
    assert len({good["id"], bad["id"]}) == 2 and done.num_written == 2


def test_openai_samples_are_choices_and_prompts_are_lines(tmp_path: Path) -> None:
    source = pictures(tmp_path / "pictures", "a.png", "b.png")
    answered_run(tmp_path / "run", source, several, prompt_names=("short", "long"), num_samples=2)
    done = export(tmp_path / "run", Format.openai, to=str(tmp_path / "x"))
    assert (done.num_written, done.left_out) == (6, {"errors beside other samples of their row": 2})
    found = lines(tmp_path / "x")
    assert [line["custom_id"] for line in found] == ["a.png/short", "a.png/long", "b.png/short", "b.png/long"]
    assert [choice["index"] for choice in found[0]["response"]["body"]["choices"]] == [0]
    assert [choice["message"]["content"] for choice in found[2]["response"]["body"]["choices"]] == [
        "b.png short 0",
        "b.png short 1",
    ]
    assert found[2]["response"]["body"]["usage"]["completion_tokens"] == 6
    assert found[3]["error"] == {"code": "generate/OutOfMemoryError", "message": "no room"}
    export(tmp_path / "run", Format.openai, to=str(tmp_path / "y"), prompt_name="long", errors=Errors.skip)
    assert [line["custom_id"] for line in lines(tmp_path / "y")] == ["a.png"]


# webdataset


def samples(folder: Path) -> list[dict[str, Any]]:
    """As the library reads them."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:  # WebDataset(path) leaves it open
            found += list(group_by_keys({**file, "__url__": ""} for file in tar_file_iterator(stream)))
    return found


# WebDataset leaves its file open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_tars_are_read_by_the_library(tmp_path: Path) -> None:
    names = ["a.jpg", "deep/b.c d.png", "e\u0301.png", "-f.jpg"]
    source = pictures(tmp_path / "pictures", *names)
    answered_run(tmp_path / "run", source, lambda row, key: f"caption of {row.id}")
    done = export(tmp_path / "run", Format.webdataset)
    found = samples(tmp_path / "run/export/webdataset")
    assert [sample["__key__"] for sample in found] == [f"{number:09d}" for number in range(4)]
    records = [json.loads(sample["json"]) for sample in found]
    assert sorted(record["id"] for record in records) == sorted(names)
    for sample, record in zip(found, records, strict=True):
        [extension] = sample.keys() & {"jpg", "png"}
        assert record["id"].endswith(extension)
        assert sample[extension] == (tmp_path / "pictures" / record["id"]).read_bytes()
        assert sample["txt"].decode() == record["response"] == f"caption of {record['id']}"
    assert done.num_written == 4
    pairs = webdataset.WebDataset(
        str(tmp_path / "run/export/webdataset/answers-000000.tar"), shardshuffle=False, empty_check=False
    )
    image, text = next(iter(pairs.decode("rgb8").to_tuple("jpg;png", "txt")))
    assert image.shape == (6, 8, 3) and text.startswith("caption of ")


def test_tars_are_read_by_our_own_reader_and_are_the_same_twice(tmp_path: Path) -> None:
    answered_run(tmp_path / "run", pictures(tmp_path / "pictures", "a.jpg", "b.png"))
    for name in ("one", "two"):
        export(tmp_path / "run", Format.webdataset, to=str(tmp_path / name))
    assert [path.read_bytes() for path in (tmp_path / "one").iterdir()] == [
        path.read_bytes() for path in (tmp_path / "two").iterdir()
    ]
    config = WebdatasetConfig(path=str(tmp_path / "one"))
    rows = list(config.open(config.scan()).rows(0, 2))
    assert [row.columns["txt"] for row in rows] == ["a.jpg is a picture", "b.png is a picture"]
    assert image_bytes(rows[1].images[0]) == picture(1)


def num_texts(path: Path) -> int:
    with tarfile.open(path) as tar:
        return sum(name.endswith(".txt") for name in tar.getnames())


def test_tars_are_of_limited_size(tmp_path: Path) -> None:
    answered_run(tmp_path / "run", pictures(tmp_path / "pictures", *(f"{n}.png" for n in range(7))))
    export(tmp_path / "run", Format.webdataset, to=str(tmp_path / "three"), tar_samples=3)
    tars = sorted((tmp_path / "three").iterdir())
    assert [path.name for path in tars] == [f"answers-00000{number}.tar" for number in range(3)]
    assert [num_texts(path) for path in tars] == [3, 3, 1]
    export(tmp_path / "run", Format.webdataset, to=str(tmp_path / "bytes"), tar_bytes=1)
    assert len(list((tmp_path / "bytes").iterdir())) == 7
    # A smaller export over a larger one leaves no tar of the larger one, and nothing of anybody else's is touched.
    (tmp_path / "bytes/answers-mine.tar").write_text("mine")
    with pytest.raises(UsageError, match=r"is there already\. exists=overwrite"):
        export(tmp_path / "run", Format.webdataset, to=str(tmp_path / "bytes"))
    export(tmp_path / "run", Format.webdataset, to=str(tmp_path / "bytes"), exists=Exists.overwrite)
    assert sorted(path.name for path in (tmp_path / "bytes").iterdir()) == ["answers-000000.tar", "answers-mine.tar"]


def test_several_records_and_images_in_a_tar(tmp_path: Path) -> None:
    pictures(tmp_path / "source", "a.png", "b.png", "c.png")
    rows = [{"pics": ["a.png", "b.png"]}, {"pics": "c.png"}]
    source = manifest(tmp_path / "source", rows, image_column="pics")
    answered_run(tmp_path / "run", source, several, prompt_names=("short", "long"), num_samples=2)
    export(tmp_path / "run", Format.webdataset, to=str(tmp_path / "x"), columns=["id", "response"])
    found = samples(tmp_path / "x")
    assert [sample["__key__"] for sample in found] == [
        "000000000-0-0", "000000000-1-0", "000000001-0-0", "000000001-0-1",
    ]  # fmt: skip
    assert found[0]["0.png"] == picture(0) and found[0]["1.png"] == picture(1)
    assert json.loads(found[3]["json"]) == {"id": "1", "response": "1 short 1"}
    export(tmp_path / "run", Format.webdataset, to=str(tmp_path / "y"), errors=Errors.include)
    found = samples(tmp_path / "y")
    assert len(found) == 8 and "txt" not in found[1] and json.loads(found[1]["json"])["status"] == "error"


def test_an_image_that_is_another_by_now_is_not_exported(tmp_path: Path) -> None:
    source = pictures(tmp_path / "pictures", "a.png", "b.png", "c.png", "d.png")
    answered_run(tmp_path / "run", source)
    (tmp_path / "pictures/a.png").write_bytes(picture(9))
    (tmp_path / "pictures/b.png").unlink()
    done = export(tmp_path / "run", Format.webdataset, to=str(tmp_path / "x"))
    assert [json.loads(sample["json"])["id"] for sample in samples(tmp_path / "x")] == ["c.png", "d.png"]
    assert done.failed == {
        "images that are others than the model was asked about": 1,
        "images that cannot be read": 1,
    }
    assert done.examples["images that cannot be read"].startswith("b.png: ")


def test_kept_images_stand_in_for_those_that_are_gone(tmp_path: Path) -> None:
    source = pictures(tmp_path / "pictures", "a.png", "b.png", "c.png", "d.png")
    answered_run(tmp_path / "run", source, write=WriteConfig(keep_images=True), prompt_names=("p", "q"))
    (tmp_path / "pictures/a.png").write_bytes(picture(9))
    (tmp_path / "pictures/d.png").unlink()
    done = export(tmp_path / "run", Format.webdataset, to=str(tmp_path / "x"))
    assert [sample["png"] for sample in samples(tmp_path / "x")] == [picture(n) for n in range(4) for _ in "pq"]
    assert not done.failed and done.num_written == 8


def test_images_that_have_moved(tmp_path: Path) -> None:
    answered_run(tmp_path / "run", pictures(tmp_path / "pictures", "a.png"))
    (tmp_path / "pictures").rename(tmp_path / "moved")
    assert export(tmp_path / "run", Format.webdataset, to=str(tmp_path / "x")).failed
    done = export(
        tmp_path / "run",
        Format.webdataset,
        to=str(tmp_path / "x"),
        root=str(tmp_path / "moved"),
        exists=Exists.overwrite,
    )
    assert done.num_written == 1 and not done.failed
    assert len(samples(tmp_path / "x")) == 1


def test_what_is_odd_in_words_and_rows_of_text_alone(tmp_path: Path) -> None:
    words = ["", "\x00\x1b[2J", "\u2028", "😀\ud7ff"]
    source = manifest(tmp_path / "source", [{"name": text} for text in words])
    answered_run(tmp_path / "run", source, lambda row, key: str(row.columns["name"]))
    before = tree(tmp_path / "run")
    export(tmp_path / "run", Format.webdataset, to=str(tmp_path / "x"))
    assert [sample["txt"].decode() for sample in samples(tmp_path / "x")] == words
    assert tree(tmp_path / "run") == before

"""One cell -> images or a conversation."""

import base64
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.cells import Origin, images_in, messages_in, origin
from pipeline.errors import RowFault, UsageError
from pipeline.records import ImageRef, Stage

HERE = Origin("/data")
URI = "data:image/png;base64," + base64.b64encode(b"picture").decode()


def kind_of(cell: Any, start: Origin = HERE) -> str:
    with pytest.raises(RowFault) as caught:
        images_in(cell, start)
    assert caught.value.stage is Stage.READ
    return caught.value.kind


@pytest.mark.parametrize(
    ("cell", "images"),
    [
        (b"picture", [ImageRef(data=b"picture")]),
        ({"bytes": b"picture", "path": "a.jpg"}, [ImageRef(data=b"picture")]),
        ({"bytes": None, "path": "a.jpg"}, [ImageRef(path="/data/a.jpg")]),
        ("sub/a b.jpg", [ImageRef(path="/data/sub/a b.jpg")]),
        ("/abs/a.jpg", [ImageRef(path="/abs/a.jpg")]),
        (URI, [ImageRef(data=b"picture")]),
        ("DATA:image/png,%41b", [ImageRef(data=b"Ab")]),
        (
            ["b.jpg", b"x", [URI], "a.jpg"],
            [
                ImageRef(path="/data/b.jpg"),
                ImageRef(data=b"x"),
                ImageRef(data=b"picture"),
                ImageRef(path="/data/a.jpg"),
            ],
        ),
        ([], []),
    ],
)
def test_a_cell_gives_its_images_in_order(cell: Any, images: list[ImageRef]) -> None:
    assert list(images_in(cell, HERE)) == images


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        (None, "NullImage"),
        ("", "NullImage"),
        ({"bytes": None, "path": None}, "NullImage"),
        (["a.jpg", None], "NullImage"),
        (7, "NoImage"),
        ({"url": "a.jpg"}, "NoImage"),
        ("data:image/png;base64,%%%", "BadDataUri"),
        ("data:image/png;base64", "BadDataUri"),
        ("http://host/a.jpg", "UrlsNotAllowed"),
        ("HTTPS://host/a.jpg", "UrlsNotAllowed"),
        ("file:///etc/passwd", "UrlsNotAllowed"),
        ("FILE:/etc/passwd", "UrlsNotAllowed"),
        ("ftp://host/a.jpg", "UrlsNotAllowed"),
        ("s3://bucket/a.jpg", "UrlsNotAllowed"),
        ("simplecache::http://host/a.jpg", "UrlsNotAllowed"),
        ("a\0.jpg", "BadPath"),
        ("QUJD" * 2000, "BadPath"),
    ],
)
def test_a_cell_that_is_no_image_is_a_fault_of_its_row(cell: Any, kind: str) -> None:
    assert kind_of(cell) == kind


def test_urls_are_taken_only_when_allowed_and_other_schemes_never() -> None:
    allowed = Origin("/data", allow_urls=True)
    assert images_in("https://host/a.jpg", allowed) == (ImageRef(path="https://host/a.jpg"),)
    for cell in ("file:///etc/passwd", "ftp://host/a", "http://host/a::file:///etc/passwd", "gopher://x"):
        assert kind_of(cell, allowed) == "UrlsNotAllowed"


def test_a_fault_does_not_repeat_a_whole_picture() -> None:
    with pytest.raises(RowFault) as caught:
        images_in("data:image/png;base64," + "?" * 100_000, HERE)
    assert len(caught.value.message) < 300


def test_root_confines_paths_after_links_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"s")
    (root / "a.jpg").write_bytes(b"a")
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "in.jpg").symlink_to("a.jpg")
    (tmp_path / "root2").mkdir()
    start = origin(str(root), "/elsewhere", False)
    for inside in ("a.jpg", "sub/../a.jpg", "in.jpg", str(root / "a.jpg")):
        assert images_in(inside, start) == (ImageRef(path=str(root.resolve() / "a.jpg")),)
    for outside in (
        "../secret.jpg",
        "out.jpg",
        "sub/../../secret.jpg",
        "/etc/passwd",
        "../root2/x",
    ):
        assert kind_of(outside, start) == "PathOutsideRoot"


def test_paths_below_a_remote_folder_stay_there() -> None:
    assert images_in("a/./b.jpg", Origin("s3://bucket/x")) == (ImageRef(path="s3://bucket/x/a/b.jpg"),)
    assert kind_of("../b.jpg", Origin("s3://bucket/x")) == "PathOutsideRoot"
    assert kind_of("/b.jpg", Origin("s3://bucket/x", confined=True)) == "PathOutsideRoot"


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.root"):
        origin(str(tmp_path / "nothing"), "/", False)


def test_a_conversation_is_a_list_or_its_json_without_the_nulls_that_struct_columns_add() -> None:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
    padded = {
        "role": "user",
        "content": [{"type": "image", "text": None}, {"type": "text", "text": "Hi"}],
        "name": None,
    }
    assert messages_in([padded]) == (turn,)
    assert messages_in('[{"role": "user", "content": "Hi"}]') == ({"role": "user", "content": "Hi"},)


@pytest.mark.parametrize(
    "cell", [None, "{", "[" * 100_000, "{}", [], [1], [{"role": "user"}], [{"role": 1, "content": ""}]]
)
def test_what_is_no_conversation_is_a_fault(cell: Any) -> None:
    with pytest.raises(RowFault, match="conversation"):
        messages_in(cell)

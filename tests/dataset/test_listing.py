"""Names of files: natural order, globs, braces, and what is not an image file."""

import os
import random
import socket
from pathlib import Path

import pytest

from pipeline.dataset.files import NOT_A_FILE, joined
from pipeline.dataset.images import ImagesConfig, accepted
from pipeline.dataset.jsonl import JsonlConfig
from pipeline.dataset.listing import listed
from pipeline.dataset.patterns import brace_words, glob_regex, natural_key
from pipeline.errors import RunFailed, UsageError
from pipeline.records import Row, Stage


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def rows_of(config: ImagesConfig) -> list[Row]:
    dataset = config.open(config.scan())
    return list(dataset.rows(0, len(dataset)))


def test_numbers_sort_as_numbers_and_folders_stay_together() -> None:
    wanted = ["2/a.jpg", "10/a.jpg", "a/x1.jpg", "a/x2.jpg", "a/x10.jpg", "a/x123456789.jpg", "a/x1234567890.jpg"]
    wanted += ["a b/x.jpg", "a-b.jpg", "img02.jpg", "img2.jpg", "img10.jpg"]
    shuffled = random.Random(0).sample(wanted, len(wanted))
    assert sorted(shuffled, key=lambda path: (natural_key(path), path)) == wanted


def test_a_glob_star_stays_in_one_folder_and_two_cross_folders() -> None:
    assert glob_regex("*.jpg").fullmatch("a/b.jpg") is None
    assert glob_regex("**/*.jpg").fullmatch("b.jpg")
    assert glob_regex("**/*.jpg").fullmatch("a/c/b.jpg")
    assert glob_regex("a[0-3].p?g").fullmatch("a2.png")
    assert glob_regex("a[!0-3].png").fullmatch("a2.png") is None
    assert glob_regex("a[.png").fullmatch("a[.png")


def test_braces_stand_for_words_and_ranges() -> None:
    assert list(brace_words("{a,b}-{08..10}.tar")) == [f"{a}-{n}.tar" for a in "ab" for n in ("08", "09", "10")]


def test_a_folder_is_read_recursively_without_hidden_files_in_any_case_of_extension(tmp_path: Path) -> None:
    touched(
        tmp_path, "b/2.JPG", "b/10.png", "a.tiff", "notes.txt", ".hidden.jpg", ".git/x.jpg", "dir.jpg/in.webp", "jpg"
    )
    inputs = ImagesConfig(path=str(tmp_path)).scan()
    assert inputs.files["path"].to_pylist() == ["a.tiff", "b/2.JPG", "b/10.png", "dir.jpg/in.webp"]
    assert any("2 hidden" in warning for warning in inputs.warnings)
    assert any("2 files" in warning and "dataset.pattern" in warning for warning in inputs.warnings)
    assert [row.id for row in rows_of(ImagesConfig(path=str(tmp_path), pattern="*"))][-1] == "notes.txt"


def test_pattern_takes_extensions_and_globs() -> None:
    assert accepted("jpg, .PNG *.gif")("a/b.png")
    assert not accepted("jpg")("a/b.jpg.txt")
    assert accepted("*.{jfif,heic}")("X.HEIC")
    assert accepted("mask_*.png")("deep/mask_1.png")
    assert accepted("train/*")("train/a.bin")
    assert not accepted("train/*")("test/a.bin")


def test_globs_single_files_and_names_with_magic_characters_are_found(tmp_path: Path) -> None:
    touched(tmp_path, "a/1.jpg", "a/2.png", "b/c/3.jpg", "odd [1].jpg")
    assert [row.id for row in rows_of(ImagesConfig(path=f"{tmp_path}/**/*.jpg"))] == [
        "a/1.jpg",
        "b/c/3.jpg",
        "odd [1].jpg",
    ]
    assert [row.id for row in rows_of(ImagesConfig(path=f"{tmp_path}/*/*.jpg"))] == ["a/1.jpg"]
    (row,) = rows_of(ImagesConfig(path=f"{tmp_path}/odd [1].jpg"))
    assert row.id == "odd [1].jpg"
    assert row.images[0].path == f"{tmp_path}/odd [1].jpg"
    assert [row.id for row in rows_of(ImagesConfig(path=f"file://{tmp_path}/b"))] == ["c/3.jpg"]


def test_a_path_that_does_not_exist_is_refused_but_an_empty_folder_is_an_empty_dataset(tmp_path: Path) -> None:
    for path in ("nothing", "nothing/*.jpg", "*.jpg", "x{1..2}.jpg"):
        with pytest.raises(UsageError, match=r"dataset\.path"):
            ImagesConfig(path=f"{tmp_path}/{path}").scan()
    with pytest.raises(UsageError, match="cannot be listed"):
        ImagesConfig(path="nosuchscheme://a/b").scan()
    config = ImagesConfig(path=str(tmp_path))
    inputs = config.scan()
    assert len(config.open(inputs)) == 0
    assert list(config.open(inputs).rows(0, 0)) == []


def test_a_missing_name_of_a_brace_pattern_is_named(tmp_path: Path) -> None:
    touched(tmp_path, "x1.jpg", "x3.jpg")
    with pytest.raises(UsageError, match=r"1 files are not there, the first is x2\.jpg"):
        listed(f"{tmp_path}/x{{1..3}}.jpg", lambda path: True)


def test_what_is_no_regular_file_is_a_row_with_a_fault_and_is_never_opened(tmp_path: Path) -> None:
    """Fault 40: pipes, devices, sockets and dangling links in a folder are error rows and never opened."""
    touched(tmp_path, "good.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "link.jpg").symlink_to("good.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    config = ImagesConfig(path=str(tmp_path))
    inputs = config.scan()
    rows = {row.id: row for row in config.open(inputs).rows(0, 7)}
    assert {name for name, row in rows.items() if row.fault is None} == {"good.jpg", "link.jpg"}
    for name, word in (
        ("fifo.jpg", "FIFO"),
        ("zero.jpg", "device"),
        ("socket.jpg", "socket"),
        ("dangling.jpg", "link"),
    ):
        fault = rows[name].fault
        assert fault is not None
        assert fault.stage is Stage.READ
        assert word in fault.message
        assert rows[name].images == ()
    sizes = dict(zip(inputs.files["path"].to_pylist(), inputs.files["size_bytes"].to_pylist(), strict=True))
    assert sizes["fifo.jpg"] == NOT_A_FILE
    assert sizes["link.jpg"] == 1


def test_a_row_that_was_no_file_is_good_once_the_link_leads_somewhere(tmp_path: Path) -> None:
    (tmp_path / "late.jpg").symlink_to("target")
    config = ImagesConfig(path=str(tmp_path))
    dataset = config.open(config.scan())
    assert next(dataset.rows(0, 1)).fault is not None
    touched(tmp_path, "target")
    assert next(dataset.rows(0, 1)).fault is None


def test_linked_folders_are_entered_once_and_loops_end(tmp_path: Path) -> None:
    touched(tmp_path, "data/a/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/up").symlink_to(tmp_path)
    (tmp_path / "data/same").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/other").symlink_to(tmp_path / "elsewhere")
    inputs = ImagesConfig(path=str(tmp_path / "data")).scan()
    assert inputs.files["path"].to_pylist() == ["a/1.jpg", "other/2.jpg"]
    assert any("3 links" in warning for warning in inputs.warnings)


def test_a_name_that_is_not_utf8_is_a_row_with_a_fault(tmp_path: Path) -> None:
    touched(tmp_path, "a.jpg")
    Path(os.fsdecode(bytes(tmp_path) + b"/b\xff.jpg")).write_bytes(b"x")
    good, bad = rows_of(ImagesConfig(path=str(tmp_path)))
    assert good.fault is None
    assert bad.id == "b\\udcff.jpg"
    assert bad.fault is not None
    assert "UTF-8" in bad.fault.message


def test_odd_names_keep_every_character(tmp_path: Path) -> None:
    names = ["-dash.jpg", "%3A.jpg", "blank name.jpg", "new\nline.jpg", "u\u0308.jpg", "\u00fc.jpg", "x" * 240 + ".jpg"]
    touched(tmp_path, *names)
    rows = rows_of(ImagesConfig(path=str(tmp_path)))
    assert {row.id for row in rows} == set(names)
    assert all(os.path.isfile(row.images[0].path or "") for row in rows)


def test_image_column_null_gives_rows_without_images(tmp_path: Path) -> None:
    (row,) = rows_of(ImagesConfig(path=str(touched(tmp_path, "a.jpg")), image_column=None))
    assert row.images == ()
    assert row.columns == {"path": "a.jpg"}


def test_an_absent_column_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.id_column=paht.*Did you mean 'path'"):
        ImagesConfig(path=str(tmp_path), id_column="paht").scan()


def test_a_path_joins_a_chained_url_at_its_own_link() -> None:
    assert joined("s3://bucket/a", "b.jpg") == "s3://bucket/a/b.jpg"
    assert joined("zip://in::s3://bucket/a.zip", "b.jpg") == "zip://in/b.jpg::s3://bucket/a.zip"
    assert joined("simplecache::s3://bucket", "b.jpg") == "simplecache::s3://bucket/b.jpg"


def test_an_unreadable_folder_is_refused_by_name(tmp_path: Path) -> None:
    locked = touched(tmp_path, "locked/a.jpg") / "locked"
    locked.chmod(0)
    try:
        if os.access(locked, os.R_OK):
            pytest.skip("this user may read every folder")
        with pytest.raises(UsageError, match="locked"):
            ImagesConfig(path=str(tmp_path)).scan()
    finally:
        locked.chmod(0o700)


def test_a_fifo_where_a_table_was_planned_is_refused_without_opening_it(tmp_path: Path) -> None:
    manifest = tmp_path / "a.jsonl"
    manifest.write_bytes(b'{"image": "a"}\n')
    config = JsonlConfig(path=str(tmp_path))
    inputs = config.scan()
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(RunFailed, match="not a regular file"):
        list(config.open(inputs).rows(0, 1))
    with pytest.raises(UsageError, match="not a regular file"):
        config.scan()

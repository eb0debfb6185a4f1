"""webdataset tars: keys, columns, what is passed over, damage, random access."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest

from pipeline.dataset.webdataset import WebdatasetConfig
from pipeline.errors import RunFailed, UsageError
from pipeline.records import ImageRef, Row, Stage

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "webdataset"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no test data at {SHARED}")


def tar_at(
    path: Path, *members: tuple[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT
) -> WebdatasetConfig:
    with tarfile.open(path, mode, format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return WebdatasetConfig(path=str(path))


def rows_of(config: WebdatasetConfig) -> list[Row]:
    dataset = config.open(config.scan())
    return list(dataset.rows(0, len(dataset)))


def test_a_sample_is_what_agrees_up_to_the_first_dot(tmp_path: Path) -> None:
    config = tar_at(
        tmp_path / "a.tar",
        ("./d.1/x.right.PNG", b"R"),
        ("./d.1/x.left.png", b"L"),
        ("./d.1/x.txt", b"two pictures"),
        ("./d.1/x.cls", b"7\n"),
        ("./d.1/y.json", json.dumps({"caption": "one", "size": [1, 2]}).encode()),
        ("./d.1/y.jpg", b"J"),
    )
    first, second = rows_of(config)
    assert first.id == "a.tar/d.1/x"
    assert [image.data for image in first.images] == [b"R", b"L"]
    assert first.columns == {"txt": "two pictures", "cls": 7, "caption": None, "size": None}
    assert second.images == (ImageRef(data=b"J"),)
    assert second.columns == {"txt": None, "cls": None, "caption": "one", "size": [1, 2]}
    config.image_column = "left.png"
    assert [row.images for row in rows_of(config)] == [(ImageRef(data=b"L"),), ()]


def test_columns_of_json_may_name_the_row_and_never_hide_a_member(tmp_path: Path) -> None:
    config = tar_at(tmp_path / "a.tar", ("1.jpg", b"x"), ("1.json", b'{"id": 5, "txt": "no"}'), ("1.txt", b"yes"))
    config.id_column = "id"
    (row,) = rows_of(config)
    assert row.id == "5"
    assert row.columns["txt"] == "yes"
    config.id_column = "idd"
    with pytest.raises(UsageError, match="Did you mean 'id'"):
        config.scan()


def test_a_sample_without_an_image_is_a_fault_even_if_its_json_names_a_path(tmp_path: Path) -> None:
    config = tar_at(tmp_path / "a.tar", ("1.json", b'{"image": "/etc/passwd"}'))
    (row,) = rows_of(config)
    assert row.images == ()
    assert row.fault is not None
    assert row.fault.kind == "NullImage"
    config.image_column = None
    assert rows_of(config)[0].fault is None


def test_pickles_links_devices_and_outside_names_are_passed_over_and_nothing_is_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Canary:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("unpickled",))

    path = tmp_path / "tars" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name in ("1.jpg", "1.pkl", "1.pyd", "../2.jpg", "/tmp/3.jpg", "a/../../4.jpg", "noextension", ".5.jpg"):
            data = pickle.dumps(Canary())
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("6.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "load", None)
    before = sorted(tmp_path.rglob("*"))
    config = WebdatasetConfig(path=str(path))
    assert [row.id for row in rows_of(config)] == ["a.tar/1"]
    assert sorted(tmp_path.rglob("*")) == before
    text = " ".join(config.scan().warnings)
    assert "4 x links" in text
    assert "3 x members with absolute names" in text
    assert "1 x .pkl members passed over" in text


def test_members_apart_from_their_sample_are_refused_with_the_reason(tmp_path: Path) -> None:
    config = tar_at(tmp_path / "a.tar", ("1.jpg", b"x"), ("2.jpg", b"x"), ("1.txt", b"x"))
    with pytest.raises(UsageError, match=r"neighbours.*'a\.tar/1' in rows 0, 2"):
        config.scan()


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        (("2.json", b"{"), "JSONDecodeError"),
        (("2.txt", b"\xff"), "UnicodeDecodeError"),
        (("2.jpg", b"y"), "DuplicateMember"),
    ],
)
def test_a_bad_member_costs_its_own_sample(tmp_path: Path, extra: tuple[str, bytes], kind: str) -> None:
    config = tar_at(tmp_path / "a.tar", ("1.jpg", b"x"), ("2.jpg", b"x"), extra, ("3.jpg", b"x"))
    rows = rows_of(config)
    assert [row.fault and row.fault.kind for row in rows] == [None, kind, None]
    assert rows[1].fault is not None
    assert rows[1].fault.stage is Stage.READ
    assert "a.tar/2" in rows[1].fault.message


@pytest.mark.parametrize("suffix", ["tar", "tgz"])
def test_a_tar_cut_short_keeps_its_whole_samples_and_says_where_it_ends(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = bytes(range(256)) * 40
    config = tar_at(path, *((f"{n}.jpg", noise[n:]) for n in range(6)), mode="w:gz" if suffix == "tgz" else "w")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.55)])
    rows = rows_of(config)
    assert rows[0].fault is None or suffix == "tgz"
    assert rows[-1].fault is not None
    assert rows[-1].fault.kind == "DamagedTar"
    dataset = config.open(config.scan())
    assert list(dataset.rows(len(rows) - 1, len(rows))) == rows[-1:]


def test_a_tar_without_its_end_mark_is_read_with_a_warning(tmp_path: Path) -> None:
    config = tar_at(tmp_path / "a.tar", ("1.jpg", b"x"))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1024])
    assert rows_of(config)[0].fault is None
    assert any("may be cut short" in warning for warning in config.scan().warnings)


def test_a_damaged_header_is_a_row_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    config = tar_at(path, ("1.jpg", b"x"), ("2.jpg", b"x"), ("3.jpg", b"x"), form=tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    data[1024] ^= 255
    path.write_bytes(data)
    good, lost = rows_of(config)
    assert good.images == (ImageRef(data=b"x"),)
    assert lost.id == "a.tar/@1024"
    assert lost.fault is not None
    assert "byte 1024" in lost.fault.message
    for content in (b"", b"text" * 500):
        path.write_bytes(content)
        (row,) = rows_of(config)
        assert row.fault is not None


def test_an_empty_archive_is_an_empty_dataset(tmp_path: Path) -> None:
    assert rows_of(tar_at(tmp_path / "a.tar")) == []


def test_long_names_and_several_formats_keep_their_keys(tmp_path: Path) -> None:
    name = "d/" * 100 + "\u00fc" * 60
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        members = [(f"{name}{n}.jpg", str(n).encode()) for n in range(300)]
        config = tar_at(tmp_path / "a.tar", *members, form=form)
        dataset = config.open(config.scan())
        (row,) = dataset.rows(259, 260)
        assert row.id == f"a.tar/{name}259"
        assert row.images == (ImageRef(data=b"259"),)


def test_a_brace_pattern_names_tars_that_must_all_be_there(tmp_path: Path) -> None:
    for number in (0, 1, 2):
        tar_at(tmp_path / f"{number:03d}.tar", (f"{number}.jpg", b"x"))
    config = WebdatasetConfig(path=f"{tmp_path}/{{000..001}}.tar")
    assert [row.id for row in rows_of(config)] == ["000.tar/0", "001.tar/1"]
    with pytest.raises(UsageError, match=r"003\.tar"):
        WebdatasetConfig(path=f"{tmp_path}/{{000..003}}.tar").scan()
    with pytest.raises(UsageError, match="does not exist"):
        WebdatasetConfig(path="pipe:cat /etc/passwd").scan()


def test_a_tar_replaced_after_the_plan_ends_the_run(tmp_path: Path) -> None:
    config = tar_at(tmp_path / "a.tar", ("1.jpg", b"x"), ("2.jpg", b"x"))
    inputs = config.scan()
    tar_at(tmp_path / "a.tar", ("1.jpg", b"x"), ("1.txt", b"x"))
    with pytest.raises(RunFailed, match="fewer samples"):
        list(config.open(inputs).rows(0, 2))


@needs_shared
def test_public_shards_are_read() -> None:
    rows = rows_of(WebdatasetConfig(path=str(SHARED / "sample.tgz")))
    assert len(rows) > 10
    assert all(row.fault is None and row.images and isinstance(row.columns["cls"], int) for row in rows)
    assert len(rows_of(WebdatasetConfig(path=str(SHARED / "mpdata.tar"), image_column=None))) == 100
    nested = rows_of(WebdatasetConfig(path=str(SHARED / "compressed.tar"), image_column=None))
    assert [row.id for row in nested] == [f"compressed.tar/compressed/000{n}" for n in (1, 2, 3)]

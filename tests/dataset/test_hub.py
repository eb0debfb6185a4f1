"""The forms of the `datasets` library. The hub itself is out of reach here: `resolved` stands alone for that."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import hub
from pipeline.dataset.hub import HubConfig, Resolved
from pipeline.errors import UsageError
from pipeline.records import ImageRef, Row


def rows_of(config: HubConfig) -> list[Row]:
    dataset = config.open(config.scan())
    return list(dataset.rows(0, len(dataset)))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


def image_file(color: str) -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(sink, "PNG")
    return sink.getvalue()


def test_what_save_to_disk_wrote_is_read_by_split_with_images_undecoded(tmp_path: Path, library: object) -> None:
    import datasets

    rows = {"image": [{"bytes": b"garbage", "path": None}] * 5, "label": [0, 1, 0, 1, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    train = datasets.Dataset.from_dict(rows, features=features)
    split = datasets.DatasetDict({"train": train, "test": train.select([4, 1])})
    split.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "test": 1})
    read = rows_of(HubConfig(path=str(tmp_path / "saved")))
    assert [row.columns["label"] for row in read] == [0, 1, 0, 1, 0]
    assert {row.images for row in read} == {(ImageRef(data=b"garbage"),)}
    assert [row.columns["label"] for row in rows_of(HubConfig(path=str(tmp_path / "saved"), split="test"))] == [0, 1]
    with pytest.raises(UsageError, match=r"\['train', 'test'\]"):
        HubConfig(path=str(tmp_path / "saved"), split="validation").scan()


def test_a_local_folder_of_parquet_is_read_where_it_lies(tmp_path: Path, library: object) -> None:
    for name, numbers in (
        ("train-00000-of-00002", [1, 2]),
        ("train-00001-of-00002", [3]),
        ("test-00000-of-00001", [9]),
    ):
        table = pa.table({"image": [b"x"] * len(numbers), "n": numbers})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
    config = HubConfig(path=str(tmp_path))
    inputs = config.scan()
    assert inputs.root == str(tmp_path / "data")
    assert [row.columns["n"] for row in rows_of(config)] == [1, 2, 3]
    assert [row.columns["n"] for row in rows_of(HubConfig(path=str(tmp_path), split="test"))] == [9]
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_local_image_folder_is_converted_once(tmp_path: Path, library: object) -> None:
    for label in ("cat", "dog"):
        folder = tmp_path / "pictures" / "train" / label
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(image_file("red"))
    rows = rows_of(HubConfig(path=str(tmp_path / "pictures")))
    assert [row.columns["label"] for row in rows] == [0, 1]
    assert all(row.images[0].path or row.images[0].data for row in rows)


def test_an_unknown_dataset_or_split_is_refused(tmp_path: Path, library: object) -> None:
    with pytest.raises(UsageError, match="nobody/nothing"):
        HubConfig(path="nobody/nothing").scan()
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="split=validation"):
        HubConfig(path=str(tmp_path), split="validation").scan()
    with pytest.raises(UsageError, match="no URL"):
        HubConfig(path="s3://bucket/saved").scan()


def test_hub_files_keep_their_commit_and_are_read_as_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    urls = [f"memory:/{tmp_path}/ds@0123abc/{folder}/0.parquet" for folder in ("b", "a")]
    for url, number in zip(urls, (1, 2), strict=True):
        with fsspec.open(url, "wb") as handle:
            pq.write_table(pa.table({"image": [b"x"], "n": [number]}), handle)
    sizes = [(url, fsspec.core.url_to_fs(url)[0].size(url)) for url in urls]
    monkeypatch.setattr(hub, "resolved", lambda config: Resolved(sizes, "0123abc"))
    config = HubConfig(path="owner/ds")
    inputs = config.scan()
    assert inputs.revision == "0123abc"
    assert inputs.files["path"].to_pylist() == ["b/0.parquet", "a/0.parquet"]
    assert [row.columns["n"] for row in rows_of(config)] == [1, 2]

"""Datasets in the forms of the `datasets` library: a hub name, a local folder, or what save_to_disk wrote.

Parquet is read where it lies, at one commit. Anything else is converted once by `datasets` into its Arrow cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from pipeline.dataset.base import Dataset, DatasetConfig, Inputs
from pipeline.dataset.cells import holds_data_uri, origin
from pipeline.dataset.files import Files, files_table, is_local, joined, local_path, open_file
from pipeline.dataset.ids import Ids
from pipeline.dataset.listing import Listing
from pipeline.dataset.parquet import ParquetRows, scanned
from pipeline.dataset.table import TableRows, kept_columns, plain_batch, plain_schema, rows_in, table_rows
from pipeline.errors import RunFailed, UsageError, VlmBatchError
from pipeline.option import option
from pipeline.records import Row

_BATCH_ROWS = 32  # rows that are Python objects at a time


@dataclass(kw_only=True, slots=True)
class HubConfig(DatasetConfig):
    """A dataset of the Hugging Face hub, a folder that load_dataset understands, or a save_to_disk folder."""

    kind: ClassVar[str] = "hub"

    split: str = option("train", "split to read")
    subset: str | None = option(None, "configuration of a dataset that has several; null = its default")
    revision: str | None = option(None, "branch, tag or commit on the hub; null = the newest, pinned when planned")

    def scan(self) -> Inputs:
        saved = _saved_folder(self)
        if saved is not None:
            return _scanned_arrow(self, saved, None)
        files = resolved(self)
        if all(url.endswith(".arrow") for url, _ in files.sizes):
            return _scanned_arrow(self, [url for url, _ in files.sizes], files.revision)
        return scanned(self, _listing(files.sizes), files.revision)

    def open(self, inputs: Inputs) -> Dataset:
        table = table_rows(self, inputs)
        is_arrow = inputs.files.num_rows and inputs.files["path"][0].as_py().endswith(".arrow")
        return ArrowRows(table, inputs) if is_arrow else ParquetRows(table, inputs)


@dataclass(frozen=True, slots=True)
class Resolved:
    """The Parquet or Arrow files of one split, with their sizes in bytes, and the hub commit they belong to."""

    sizes: list[tuple[str, int]]
    revision: str | None


def resolved(config: HubConfig) -> Resolved:
    """Ask `datasets` which files a split consists of. The only function here that may use the network.

    Raises:
        UsageError: no such dataset, subset or split.
    """
    import datasets
    import fsspec

    path = local_path(config.path) if os.path.exists(config.path) else config.path
    chosen = {"name": config.subset, "revision": config.revision if path == config.path else None}
    try:
        builder = datasets.load_dataset_builder(path, **chosen)
        urls = [str(url) for url in (builder.config.data_files or {}).get(config.split, [])]
        if not urls or not all(url.lower().endswith(".parquet") for url in urls):
            loaded = datasets.load_dataset(path, split=config.split, **chosen)
            urls = [entry["filename"] for entry in loaded.cache_files]
    except Exception as error:  # datasets raises of many kinds, down to bare ValueError and FileNotFoundError
        raise UsageError(
            f"dataset.path={config.path} (subset={config.subset}, split={config.split}, revision={config.revision}) "
            f"cannot be resolved: {type(error).__name__}: {error}"
        ) from error
    pinned = [url.partition("@")[2].partition("/")[0] for url in urls if url.startswith("hf://")]
    sizes = [(url, int(fsspec.core.url_to_fs(url)[0].size(url) or 0)) for url in urls]
    return Resolved(sizes, pinned[0] if pinned else None)


def _saved_folder(config: HubConfig) -> list[str] | None:
    """The Arrow files of a save_to_disk folder, or None if the path is none."""
    if not is_local(config.path):
        raise UsageError(f"dataset.path={config.path}: dataset=hub takes a hub name or a local folder, no URL.")
    folder = local_path(config.path)
    splits = os.path.join(folder, "dataset_dict.json")
    if os.path.isfile(splits):
        names = _json(splits).get("splits", [])
        if config.split not in names:
            raise UsageError(f"dataset.split={config.split}: {folder} has the splits {names}.")
        folder = os.path.join(folder, config.split)
    state = os.path.join(folder, "state.json")
    if not os.path.isfile(state):
        return None
    return [os.path.join(folder, os.path.basename(entry["filename"])) for entry in _json(state)["_data_files"]]


def _json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as handle:
            return json.load(handle)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _listing(sizes: list[tuple[str, int]]) -> Listing:
    """Files in the order in which they were given, below the folder that they share."""
    parts = [url.split("/")[:-1] for url, _ in sizes]
    depth = min((len(folders) for folders in parts), default=0)
    while depth and len({tuple(folders[:depth]) for folders in parts}) > 1:
        depth -= 1
    root = "/".join(parts[0][:depth]) if parts else "/"
    return Listing(root or "/", ["/".join(url.split("/")[depth:]) for url, _ in sizes], [size for _, size in sizes])


def _scanned_arrow(config: HubConfig, paths: list[str], revision: str | None) -> Inputs:
    for path in paths:
        if not os.path.isfile(path):
            raise UsageError(f"{path}, named by state.json, is not there.")
    listing = _listing([(path, os.path.getsize(path)) for path in paths])
    tables = [_mapped(listing.root, *file, UsageError) for file in zip(listing.paths, listing.sizes, strict=True)]
    schemas = [plain_schema(table.schema) for table in tables]
    origin(config.root, listing.root, config.allow_urls)
    for path, schema in zip(listing.paths, schemas, strict=True):
        if schema != schemas[0]:
            raise UsageError(f"columns of {path} are not those of {listing.paths[0]}.")
    name = config.image_column
    first = tables[0][name].slice(0, 64).to_pylist() if tables and name in tables[0].column_names else []
    uris = any(map(holds_data_uri, first))
    columns, warnings = kept_columns(config, schemas[0], uris) if schemas else (pa.schema([]), [])
    files = files_table(listing.paths, listing.sizes, [table.num_rows for table in tables])
    if config.id_column and tables:
        ids = Ids(f"dataset.id_column={config.id_column}")
        for table in tables:
            for batch in table.select([config.id_column]).to_batches():
                ids.add(plain_batch(batch).column(0))
        ids.check()
    return Inputs(listing.root, files, columns, revision, tuple(warnings))


class ArrowRows:
    """Rows of Arrow stream files, memory mapped: a slice touches only its own pages."""

    def __init__(self, table: TableRows, inputs: Inputs) -> None:
        self._table = table
        self._root = inputs.root
        self._files = Files(inputs.files)
        self._mapped: tuple[str, pa.Table] | None = None

    def __len__(self) -> int:
        return len(self._files)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for span in self._files.spans(start, stop):
            if self._mapped is None or self._mapped[0] != span.path:
                self._mapped = (span.path, _mapped(self._root, span.path, span.size_bytes, RunFailed))
            table = self._mapped[1].select(self._table.needed).slice(span.start, span.stop - span.start)
            index = span.first + span.start
            for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
                yield from rows_in(self._table, batch, index, span)
                index += len(batch)


def _mapped(root: str, path: str, size_bytes: int, error: type[VlmBatchError]) -> pa.Table:
    open_file(root, path, size_bytes, error).close()
    try:
        with pa.memory_map(joined(root, path)) as source, pa.ipc.open_stream(source) as reader:
            return reader.read_all()
    except (OSError, pa.ArrowException) as cause:
        raise error(f"{joined(root, path)} is no readable Arrow stream: {cause}") from cause

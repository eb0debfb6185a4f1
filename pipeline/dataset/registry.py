"""The readers by the name that a plan knows them by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pipeline.dataset.base import DatasetConfig
from pipeline.dataset.demo import DemoConfig
from pipeline.dataset.hub import HubConfig
from pipeline.dataset.images import ImagesConfig
from pipeline.dataset.jsonl import JsonlConfig
from pipeline.dataset.parquet import ParquetConfig
from pipeline.dataset.webdataset import WebdatasetConfig

READERS: Mapping[str, type[DatasetConfig]] = {
    reader.kind: reader
    for reader in (DemoConfig, ImagesConfig, ParquetConfig, JsonlConfig, HubConfig, WebdatasetConfig)
}


def planned_reader(settings: Mapping[str, Any]) -> DatasetConfig:
    """The reader of a plan with these settings; options that change no answer have their defaults."""
    reader = READERS[settings["dataset.kind"]]
    options = {entry.name: f"dataset.{entry.name}" for entry in fields(reader)}
    return reader(**{name: settings[key] for name, key in options.items() if key in settings})

"""The pictures that come with the package: what `dataset=demo` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.dataset.base import Inputs
from pipeline.dataset.listing import listed
from pipeline.dataset.parquet import ParquetConfig, scanned
from pipeline.errors import UsageError
from pipeline.option import option

DEMO_FILE = Path(__file__).with_name("demo.parquet")  # columns id, images, question, answer, task


@dataclass(kw_only=True, slots=True)
class DemoConfig(ParquetConfig):
    """A few pictures with questions and answers, packaged."""

    kind: ClassVar[str] = "demo"

    path: str = option("demo", "fixed: the pictures of the package")
    image_column: str | None = option("images", "column with the image or images of a row; null = text only")
    id_column: str | None = option("id", "column that names a row; null = row_index")

    def scan(self) -> Inputs:
        if self.path != "demo":
            raise UsageError(
                f"dataset=demo has its own pictures; dataset=parquet dataset.path={self.path} reads others."
            )
        return scanned(self, listed(str(DEMO_FILE), lambda path: True))

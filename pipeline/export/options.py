"""The words of `vlm-batch export`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum

from pipeline.errors import UsageError
from pipeline.option import option


class Format(StrEnum):
    """What the answers are written as; each is a module of this folder (pipeline.export.formats)."""

    txt = "txt"
    caption = "caption"
    jsonl = "jsonl"
    csv = "csv"
    llava = "llava"
    openai = "openai"
    webdataset = "webdataset"
    parquet = "parquet"
    arrow = "arrow"
    hub = "hub"


class Exists(StrEnum):
    """What becomes of a file that is there already."""

    skip = "skip"
    overwrite = "overwrite"
    append = "append"
    prepend = "prepend"


class Errors(StrEnum):
    """What becomes of error records."""

    skip = "skip"
    include = "include"


@dataclass(kw_only=True, slots=True)
class ExportOptions:
    """The words that only `vlm-batch export` knows."""

    format: Format | None = option(None, f"what to write: {', '.join(Format)}; hub = a dataset of the Hugging Face hub")
    to: str | None = option(
        None,
        "file or folder to write, or an fsspec URL; null = beside the images (txt, caption), else in OUTPUT_DIR/export",
    )
    root: str | None = option(None, "folder or URL that the images lie in now; null = where they were")
    partial: bool = option(False, "take what a run has that is not finished")
    prompt_name: str | None = option(None, "records of this prompt alone; null = of all prompts")
    sample_index: int | None = option(None, "records of this sample alone, from 0; null = of all samples", least=0)
    errors: Errors | None = option(
        None, "error records: skip or include; null = skip in txt, caption, llava and webdataset, else include"
    )
    fail_phrases: list[str] = option(
        doc="an answer that holds one of these, in upper or lower case, is left out", factory=list
    )
    columns: list[str] | None = option(None, "columns to write, in this order; null = all")
    exists: Exists | None = option(
        None,
        "files that are there: skip, overwrite, append or prepend (the last two: txt, caption); null = skip in txt and "
        "caption, else refuse",
    )
    prefix: str = option("", "txt, caption: put before every answer, as it is")
    separator: str = option(" ", "txt, caption: between what is in a file and what is appended or prepended")
    one_line: bool = option(True, "txt, caption: line breaks become blanks, as trainers read the first line alone")
    full_names: bool = option(False, "txt, caption: keep the image's extension in the name, as in a.jpg.txt")
    escape_formulas: bool = option(
        True, "csv: a ' before text that a spreadsheet would take for a formula, which begins with = + - @ TAB or CR"
    )
    bom: bool = option(False, "csv: begin with a byte order mark, by which Excel knows UTF-8")
    copy_images: bool = option(False, "llava: write the images beside the file, too; needed where they are no files")
    tar_samples: int = option(1000, "webdataset: most samples in one tar", least=1)
    tar_bytes: int = option(1_000_000_000, "webdataset: a tar of this many bytes is full", least=1)
    repo_id: str | None = option(None, "hub: the dataset's name, as USER/NAME")
    private: bool = option(True, "hub: a repository that is made is private; one that is there stays as it is")
    license: str = option("unknown", "hub: license of the dataset in its card, as the hub names it (cc-by-4.0 ...)")


COMMON = frozenset(["format", "partial", "prompt_name", "sample_index", "fail_phrases", "exists"])  # all formats obey


def refuse_idle_words(options: ExportOptions, obeyed: frozenset[str]) -> None:
    """Refuse what a format would not obey.

    obeyed: names of the options that it does.

    Raises:
        UsageError: another one is set.
    """
    assert options.format is not None
    defaults = ExportOptions()
    for entry in fields(options):
        if getattr(options, entry.name) != getattr(defaults, entry.name) and entry.name not in obeyed:
            raise UsageError(f"{entry.name}= means nothing with format={options.format.value}; leave it out.")

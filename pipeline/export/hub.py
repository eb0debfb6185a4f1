"""format=hub: the answers as a dataset of the Hugging Face hub: shards as Parquet files, and the card.

Who pushes is known by HF_TOKEN or by `hf auth login`; no word of ours takes a token. A repository that is made is
private unless the word says otherwise. Shards go as they lie there or, where records are chosen, through a temporary
folder. Up to a thousand files are one commit, so that readers see all of it or nothing; of more, the last commit brings
the card and takes away what an earlier push had and this one has not.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.card import NAME, CardFacts, card_text, facts_of, is_ours
from pipeline.errors import RunFailed, UsageError, VlmBatchError
from pipeline.export.destination import refuse_sidecar_words
from pipeline.export.one_file import table_schema
from pipeline.export.options import COMMON, Errors, ExportOptions
from pipeline.export.selection import Selection
from pipeline.status import read_status
from pipeline.write.file import Place
from pipeline.write.object_store import ObjectPath

log = logging.getLogger(__name__)

OBEYED = COMMON | {"errors", "repo_id", "private", "license"}
ERRORS = Errors.include
_MOST_FILES = 1000  # in a commit
_KIND = {"repo_type": "dataset"}


def export(selection: Selection, options: ExportOptions, output_dir: Place) -> str:
    """Push it; where it is, as a phrase.

    Raises:
        UsageError: repo_id is missing or none, or the repository holds data already.
        RunFailed: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # as documented

    if options.repo_id is None:
        raise UsageError("format=hub needs repo_id=USER/NAME, the dataset's name on the hub.")
    try:
        validate_repo_id(options.repo_id)
    except HFValidationError as problem:
        raise UsageError(f"repo_id={options.repo_id}: {problem}") from None
    refuse_sidecar_words(options.exists)
    try:
        return f"at {_pushed(HfApi(), options.repo_id, selection, options, output_dir)}"
    except VlmBatchError:
        raise
    except Exception as problem:  # the client's own errors, those of its HTTP library, OSError, ValueError
        raise RunFailed(f"{options.repo_id} cannot be pushed: {type(problem).__name__}: {problem}") from problem


def _pushed(api: Any, repo_id: str, selection: Selection, options: ExportOptions, output_dir: Place) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    facts = facts_of(read_status(output_dir), license=options.license)
    url = str(api.create_repo(repo_id, private=options.private, exist_ok=True, **_KIND))
    there = set(api.list_repo_files(repo_id, **_KIND))
    old = {name for name in there if name.startswith("data/") and name.endswith(".parquet")}
    if old and options.exists is None:
        raise UsageError(f"{repo_id} holds {len(old):,} data files already. exists=overwrite replaces them.")
    errors: Counter[str] = Counter()
    operations: list[Any] = []
    with TemporaryDirectory(prefix="vlm-batch-") as folder:
        for name, path in _shards(selection, options, Path(folder), errors):
            if len(operations) == _MOST_FILES:
                api.create_commit(repo_id, operations, commit_message=f"{_MOST_FILES} files of answers", **_KIND)
                _clear(Path(folder), keep=path)
                operations = []
            operations.append(CommitOperationAdd(name, path))
            old.discard(name)
        if _is_chosen(options):
            note = f"These are {selection.num_written:,} records that were chosen from {facts.num_records:,}."
            facts = CardFacts(
                num_records=selection.num_written,
                errors=dict(errors.most_common()),
                numerics=facts.numerics,
                license=facts.license,
                note=note,
            )
        if NAME not in there or is_ours(Path(api.hf_hub_download(repo_id, NAME, **_KIND)).read_bytes()):
            operations.append(CommitOperationAdd(NAME, card_text(selection.plan, facts).encode()))
        else:
            log.warning("%s has a card that is not of this program, or was edited; it stays as it is", repo_id)
        operations += [CommitOperationDelete(name) for name in sorted(old)]
        api.create_commit(repo_id, operations, commit_message=f"{selection.num_written:,} answers", **_KIND)
    return url


def _is_chosen(options: ExportOptions) -> bool:
    """Whether some records may be left out, so that shards cannot go as they are."""
    words = (options.prompt_name, options.sample_index, options.fail_phrases or None)
    return options.errors is Errors.skip or any(word is not None for word in words)


def _shards(
    selection: Selection, options: ExportOptions, folder: Path, errors: Counter[str]
) -> Iterator[tuple[str, Path]]:
    """Names in the repository, and the files to put there; those that have to be made are made in `folder`.

    errors: counts the error records of files that are made, by "stage/type".
    """
    files = selection.results.files
    if not _is_chosen(options):
        selection.num_written += selection.results.num_records
        for file in files:
            path = folder / file.name if isinstance(file, ObjectPath) else file
            if isinstance(file, ObjectPath):
                path.write_bytes(file.read_bytes())
            yield f"data/{file.name}", path
        return
    columns = selection.columns(with_bytes=True)
    kinds = ["status", "error_stage", "error_type"]
    asked = list(dict.fromkeys([*columns.values(), *kinds]))
    schema = table_schema(selection, columns)
    for file in files:
        path, number = folder / file.name, selection.num_written
        with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in selection.tables_of(file, asked):
                found = (row for row in table.select(kinds).to_pylist() if row["status"] == "error")
                errors.update(f"{row['error_stage']}/{row['error_type']}" for row in found)
                writer.write_table(pa.table(table.select(list(columns.values())).columns, schema=schema))
                selection.num_written += len(table)
        if selection.num_written > number:
            yield f"data/{file.name}", path


def _clear(folder: Path, *, keep: Path) -> None:
    for path in folder.iterdir():
        if path != keep:
            path.unlink()

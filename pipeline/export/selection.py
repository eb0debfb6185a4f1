"""Which records of a run are exported, file by file, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.table import holds_bytes
from pipeline.errors import RunFailed, UsageError
from pipeline.export.options import ExportOptions
from pipeline.plan import Plan
from pipeline.results import Results
from pipeline.write.file import Place, open_read

_ASKED = ("prompt_name", "sample_index", "status", "error_stage", "error_type", "response")
_PART_ROWS = 100
_BUFFER_BYTES = 1 << 20


class Selection:
    """The chosen records of a run's files.

    Args:
        with_errors: whether error records are among them.

    Raises:
        UsageError: the run has no such prompt or sample, or a phrase is empty.
    """

    def __init__(self, results: Results, options: ExportOptions, *, with_errors: bool) -> None:
        assert results.plan is not None
        self.results = results
        self.plan: Plan = results.plan
        self.left_out: Counter[str] = Counter()  # records, by what is said of them
        self.failed: Counter[str] = Counter()  # records that should have been written and could not be, by the reason
        self.examples: dict[str, str] = {}  # an id for each reason
        self.num_written = 0  # records
        self._options, self._with_errors = options, with_errors
        if "" in options.fail_phrases:
            raise UsageError("fail_phrases= holds an empty phrase, which every answer has.")
        name, sample = options.prompt_name, options.sample_index
        if name is not None and name not in self.plan.prompt_names:
            raise UsageError(f"prompt_name={name}: the run's prompts are {', '.join(self.plan.prompt_names)}.")
        if sample is not None and sample >= self.plan.num_samples:
            raise UsageError(f"sample_index={sample}: the run has {self.plan.num_samples} samples, counted from 0.")

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The chosen prompts."""
        return self.plan.prompt_names if self._options.prompt_name is None else (self._options.prompt_name,)

    @property
    def num_samples(self) -> int:
        """The chosen samples of each prompt."""
        return self.plan.num_samples if self._options.sample_index is None else 1

    @property
    def records_per_row(self) -> int:
        return len(self.prompt_names) * self.num_samples

    def fail(self, why: str, row_id: str) -> None:
        """Note a record that cannot be written."""
        self.failed[why] += 1
        self.examples.setdefault(why, row_id)

    def require_one_per_row(self, why: str) -> None:
        """Refuse several records of one row.

        why: there can be but one, as a sentence.

        Raises:
            UsageError: naming the words that choose one.
        """
        if len(self.prompt_names) > 1:
            names = ", ".join(self.plan.prompt_names)
            raise UsageError(f"{why} The run has the prompts {names}: choose one with prompt_name=.")
        if self.num_samples > 1:
            raise UsageError(f"{why} The run has {self.num_samples} samples of each: choose one with sample_index=.")

    def record_id(self, row_id: str, prompt_name: str, sample_index: int) -> str:
        """What tells a record from all others that are exported: the row's id, where it has one record."""
        parts = [row_id]
        if len(self.prompt_names) > 1:
            parts.append(prompt_name)
        if self.num_samples > 1:
            parts.append(str(sample_index))
        return "/".join(parts)

    def columns(self, *, with_bytes: bool) -> dict[str, str]:
        """The columns to write: what they are called in the files -> how tables() is asked for them.

        with_bytes: columns that hold bytes (kept images) as well.

        Raises:
            UsageError: one that is named is not there, named twice, or holds bytes.
        """
        schema, named = self.results.schema, self._options.columns
        if named is not None and (twice := [name for name, number in Counter(named).items() if number > 1]):
            raise UsageError(f"columns= names {twice[0]!r} twice.")
        found = {}
        for name in schema.names if named is None else named:
            ask = self.results.column(name)
            if not with_bytes and holds_bytes(schema.field(name).type):
                if named is not None:
                    raise UsageError(f"columns= names {name!r}, which holds bytes; parquet and arrow take those.")
                continue
            found[name] = ask
        return found

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The chosen records of one file after the other; what is not chosen is counted in `left_out`.

        columns: as Results.tables() takes them.

        Raises:
            UsageError, RunFailed: as Results.tables().
        """
        for path in self.results.files:
            yield from self.tables_of(path, columns)

    def tables_of(self, path: Place, columns: Sequence[str]) -> Iterator[pa.Table]:
        """As tables(), of one file; with columns of bytes a hundred records at a time.

        The images of up to 1,024 rows of a shard are one page of Parquet, and are unpacked at once all the same: 600 MB
        of them took 2.4 GB here, writing them included.
        """
        asked = list(dict.fromkeys([*columns, *_ASKED]))
        schema = self.results.schema
        in_file = {self.results.column(name): name for name in schema.names}
        if any(column in in_file and holds_bytes(schema.field(in_file[column]).type) for column in columns):
            tables = _parts(path, {column: in_file[column] for column in asked})
        else:
            tables = replace(self.results, files=(path,)).tables(asked)
        for table in tables:
            yield self._chosen(table).select(list(columns))

    def _chosen(self, table: pa.Table) -> pa.Table:
        options = self._options
        if options.prompt_name is not None:
            table = self._without(table, pc.not_equal(table["prompt_name"], options.prompt_name), "of other prompts")
        if options.sample_index is not None:
            table = self._without(table, pc.not_equal(table["sample_index"], options.sample_index), "other samples")
        if not self._with_errors:
            is_error = pc.equal(table["status"], "error")
            errors = table.filter(is_error)
            kinds = zip(errors["error_stage"].to_pylist(), errors["error_type"].to_pylist(), strict=True)
            self.left_out.update(f"error {stage}/{kind}" for stage, kind in kinds)
            table = table.filter(pc.invert(is_error))
        for phrase in options.fail_phrases:
            # Models write the apostrophe of I'm in two ways.
            text = pc.replace_substring(table["response"], "\u2019", "'")
            found = pc.match_substring(text, phrase.replace("\u2019", "'"), ignore_case=True)
            table = self._without(table, pc.fill_null(found, False), f"with the phrase {phrase!r}")
        return table

    def _without(self, table: pa.Table, unwanted: pa.ChunkedArray, why: str) -> pa.Table:
        if number := pc.sum(unwanted).as_py():
            self.left_out[why] += number
        return table.filter(pc.invert(unwanted))


def _parts(path: Place, names: Mapping[str, str]) -> Iterator[pa.Table]:
    """A shard some rows at a time.

    names: what a column is to be called -> its name in the file.
    """
    try:
        with (
            open_read(path) as source,
            pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, page_checksum_verification=True) as file,
        ):
            for batch in file.iter_batches(_PART_ROWS, columns=list(names.values()), use_threads=False):
                plain = (_plain(batch.column(name)) for name in names.values())
                yield pa.table(dict(zip(names, plain, strict=True)))
    except (OSError, ValueError, pa.ArrowException) as problem:
        raise RunFailed(
            f"{path} is damaged ({problem}). Delete it and run again: only its rows are asked for anew."
        ) from problem


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column

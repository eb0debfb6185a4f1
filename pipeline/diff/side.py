"""One of the two that are compared: which of its records, and which of its columns."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UsageError
from pipeline.results import INPUT, Results, results_at


def _is_text(found: pa.DataType) -> bool:
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found))


def _is_hashes(found: pa.DataType) -> bool:
    return _is_text(found) or (pa.types.is_list(found) and _is_text(found.value_type))


# Ours that are compared where both have them, and what their type has to be: others' files have names of all kinds.
_COMPARED: dict[str, Callable[[pa.DataType], bool]] = {
    "status": _is_text,
    "error_stage": _is_text,
    "error_type": _is_text,
    "error_message": _is_text,
    "prompt": _is_text,
    "finish_reason": _is_text,
    "num_generated_tokens": pa.types.is_integer,
    "image_sha256": _is_hashes,
}
_OF_RESPONSE = ("finish_reason", "num_generated_tokens")


@dataclass(frozen=True, slots=True)
class Side:
    """A run, or Parquet files of anybody."""

    name: str  # a or b
    results: Results
    response: str  # the column that is compared, as Results.tables() knows it
    prompt: str | None  # only records of this prompt_name; None = all
    prompt_names: tuple[str, ...]  # of the records that are compared; empty where there is no such column

    def column(self, name: str) -> str:
        """A column that the user named, as Results.tables() knows it: the name in the files, or ours without prefix.

        Raises:
            UsageError: there is no such column.
        """
        if name not in self.results.schema.names and name in self.results.names:
            return name
        return self.results.column(name)

    def has(self, name: str) -> bool:
        return name in self.results.schema.names or name in self.results.names

    @property
    def compared(self) -> list[str]:
        """Our columns beside the answer that are compared."""
        there = [name for name, fits in _COMPARED.items() if name in self.results.names and fits(self.type_of(name))]
        # An ending and a length are those of the run's own answers.
        return there if self.response == "response" else [name for name in there if name not in _OF_RESPONSE]

    def type_of(self, column: str) -> pa.DataType:
        """Of a column as Results.tables() gives it."""
        found = self.results.schema.field(self.results.in_file(column)).type
        return found.value_type if pa.types.is_dictionary(found) else found


def open_side(name: str, address: str | None, *, prompt: str | None, response: str | None) -> Side:
    """A side as the words name it.

    Raises:
        UsageError: there is no run and no Parquet file, no such prompt, or no such column.
        RunFailed: a file cannot be read.
    """
    if address is None:
        raise UsageError(f"{name} is not set. Give the folder of a run, or Parquet files: vlm-batch diff a=... b=...")
    results = results_at(address)
    if response is not None:
        column = Side(name, results, "", None, ()).column(response)
    elif "response" in results.names:
        column = "response"
    else:
        raise UsageError(
            f"{name}={address} has no column 'response'; say which holds the answers: {name}_response=COLUMN. Its "
            f"columns are {', '.join(results.schema.names)}."
        )
    _refuse_nested(name, column, Side(name, results, column, None, ()).type_of(column))
    names = _prompt_names(results)
    if prompt is not None:
        if prompt not in names:
            near = difflib.get_close_matches(prompt, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            there = f"its prompts are {', '.join(names)}" if names else "it has no column prompt_name"
            raise UsageError(f"{name}_prompt={prompt}: {name} has no such prompt.{hint} {there[0].upper()}{there[1:]}.")
        names = (prompt,)
    return Side(name, results, column, prompt, names)


def _refuse_nested(name: str, column: str, found: pa.DataType) -> None:
    if pa.types.is_nested(found) or pa.types.is_binary(found) or pa.types.is_large_binary(found):
        raise UsageError(
            f"{name}_response={column.removeprefix(INPUT)}: the column has the type {found}; expected text or numbers."
        )


def _prompt_names(results: Results) -> tuple[str, ...]:
    if results.plan is not None:
        return results.plan.prompt_names
    if "prompt_name" not in results.names:
        return ()
    found: dict[str, None] = {}
    for table in results.tables(["prompt_name"]):
        found |= dict.fromkeys(map(str, pc.unique(table["prompt_name"]).to_pylist()))
    return tuple(found)


def answered(table: pa.Table, response: str) -> pa.ChunkedArray:
    """Which records have an answer."""
    there = pc.is_valid(table[response])
    if "status" in table.column_names:
        there = pc.and_(there, pc.fill_null(pc.not_equal(table["status"], "error"), True))
    return there


def errors(table: pa.Table) -> Iterator[str]:
    """The class of each record's error, as `stage/type`; what is left out with an answer is for whoever asks."""
    stages, kinds = (
        table[name].to_pylist() if name in table.column_names else [None] * len(table)
        for name in ("error_stage", "error_type")
    )
    for stage, kind in zip(stages, kinds, strict=True):
        yield f"{stage or 'unknown'}/{kind or 'unknown'}" if stage or kind else "no answer"

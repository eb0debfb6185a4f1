"""The columns of the output: ours around the input's, and what they are called.

A shard's file also carries a small JSON object in its schema metadata (ShardSummary): the plan it belongs to and its
counts, so that `status` and resume read a footer and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.option import option
from pipeline.records import Answer

SCHEMA_VERSION = 1
METADATA_KEY = b"vlm_batch"
_NAMES = pa.dictionary(pa.int32(), pa.string())


@dataclass(kw_only=True, slots=True)
class WriteConfig:
    """How the output is cut, named and synced."""

    shard_rows: int = option(
        1000, "input rows in one output file; fixed by the plan at the first start", speed=True, least=1
    )
    sync_seconds: float = option(
        5.0, "at most this many seconds of finished work are lost by a kill", speed=True, least=0.01
    )
    response_column: str = option("response", "name of the column with the answers")
    prefix: str = option("", "put before the name of each of our columns")
    keep_images: bool = option(False, "keep the encoded images too, as a list of {bytes, path}")
    compression: str = option("zstd", "Parquet compression: zstd, snappy, gzip, lz4 or none", speed=True)


# Images as datasets' Image feature stores them: cast_column(name, List(Image())) makes pictures of them.
# Large: a shard of photographs has more than the 2 GiB that 32-bit offsets reach.
IMAGES = pa.list_(pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))
# What differs from record to record: the journal keeps these (and the input columns).
ANSWER_FIELDS = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("row_index", pa.int64(), nullable=False),
    pa.field("prompt_name", pa.string(), nullable=False),
    pa.field("sample_index", pa.int32(), nullable=False),
    pa.field("row_key", pa.string()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error_stage", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("warnings", pa.list_(pa.string())),
    pa.field("prompt", pa.string()),
    pa.field("response", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("num_prompt_tokens", pa.int32()),
    pa.field("num_image_tokens", pa.int32()),
    pa.field("num_generated_tokens", pa.int32()),
    pa.field("num_images", pa.int32()),
    pa.field("image_sha256", pa.list_(pa.string())),
    pa.field("image_width", pa.list_(pa.int32())),
    pa.field("image_height", pa.list_(pa.int32())),
    pa.field("attempt", pa.int32(), nullable=False),
)
# Behind `response`, of a run whose answers are constrained.
FORM_FIELDS = (
    pa.field("response_json", pa.string()),
    pa.field("parse_ok", pa.bool_()),
)
# What is the same for every record of a plan: added when a shard is published.
PLAN_FIELDS = (
    pa.field("model_id", _NAMES),
    pa.field("model_revision", _NAMES),
    pa.field("run_id", _NAMES),
)


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What a published shard says of itself in its footer."""

    plan_id: str
    shard: int
    num_rows: int  # records
    num_errors: int
    errors: Mapping[str, int]  # "stage/type" -> records
    num_generated_tokens: int
    numerics: Mapping[str, str]  # engine, attention kernel, device, library versions
    generation: int = 0  # how often error records were asked again
    schema_version: int = SCHEMA_VERSION

    def to_metadata(self) -> dict[bytes, bytes]:
        return {METADATA_KEY: json.dumps(asdict(self), sort_keys=True).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> ShardSummary | None:
        """The summary in a footer; None where the file is not one of ours."""
        raw = (metadata or {}).get(METADATA_KEY)
        if raw is None:
            return None
        try:
            return cls(**json.loads(raw))
        except (ValueError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class OutputSchema:
    """Which columns a shard has and what they are called."""

    inputs: pa.Schema  # the input columns that are kept
    response_column: str
    prefix: str
    image_column: str | None = None  # of `inputs`, the one that keeps the images
    is_constrained: bool = False  # answers have FORM_FIELDS

    @property
    def answer_fields(self) -> tuple[pa.Field, ...]:
        """Our columns that differ from record to record."""
        after = {"response": FORM_FIELDS} if self.is_constrained else {}
        return tuple(one for field in ANSWER_FIELDS for one in (field, *after.get(field.name, ())))

    def column(self, name: str) -> str:
        """Our column `name` as it is called in the file."""
        return self.prefix + (self.response_column if name == "response" else name)

    @property
    def journal(self) -> pa.Schema:
        """The columns of a journal: internal names, input columns behind them under `input.`."""
        kept = [pa.field(f"input.{field.name}", field.type) for field in self.inputs]
        return pa.schema([*self.answer_fields, *kept])

    @property
    def published(self) -> pa.Schema:
        """The columns of a shard: id first, the input's own next, ours behind."""
        ours = [field.with_name(self.column(field.name)) for field in (*self.answer_fields, *PLAN_FIELDS)]
        return pa.schema([ours[0], *(pa.field(f.name, f.type) for f in self.inputs), *ours[1:]])

    def publish(self, journal: pa.Table, constants: Mapping[str, str | None]) -> pa.Table:
        """A shard's table from its journal's: columns renamed and ordered, the plan's constants added."""
        arrays: dict[str, Any] = {self.column(f.name): journal[f.name] for f in self.answer_fields}
        arrays |= {f.name: journal[f"input.{f.name}"] for f in self.inputs}
        for field in PLAN_FIELDS:
            column = pa.array([constants[field.name]] * len(journal), pa.string())
            arrays[self.column(field.name)] = column.dictionary_encode().cast(field.type)
        schema = self.published
        return pa.table([arrays[name] for name in schema.names], schema=schema)


def output_schema(
    options: WriteConfig,
    columns: pa.Schema,
    *,
    keep: Sequence[str] | None = None,
    id_column: str | None = None,
    image_column: str | None = None,
    is_constrained: bool = False,
) -> OutputSchema:
    """The output's columns, checked.

    keep: input columns that stay; None = all. image_column: where write.keep_images puts the images. is_constrained:
    whether answers have to be of a form, which adds FORM_FIELDS.

    Raises:
        UsageError: an input column has one of our names or a type that Parquet cannot hold, the options name a column
            twice, or a value of theirs cannot be.
    """
    _check_options(options)
    for name in keep or ():
        if name not in columns.names:
            raise UsageError(
                f"dataset.columns names {name!r}, which the dataset does not have; its columns are {columns.names}."
            )
    kept = [field for field in columns if keep is None or field.name in keep]
    # Ours holds the same value as text, so the input's own `id` would only be a duplicate of it.
    own_id = options.prefix + "id"
    kept = [field for field in kept if not (field.name == id_column and field.name == own_id)]
    if options.keep_images and image_column is not None:
        kept = [field for field in kept if field.name != image_column] + [pa.field(image_column, IMAGES)]
    images = image_column if options.keep_images else None
    schema = OutputSchema(pa.schema(kept), options.response_column, options.prefix, images, is_constrained)
    ours = [schema.column(field.name) for field in (*schema.answer_fields, *PLAN_FIELDS)]
    if len(set(ours)) < len(ours):
        raise UsageError(
            f"write.response_column={options.response_column!r} is the name of another output column; choose another."
        )
    if clash := sorted(set(ours) & {field.name for field in kept}):
        raise UsageError(
            f"The input has columns {clash}, which are names of our own. Set write.prefix (for example "
            "write.prefix=vlm_), or leave them out with dataset.columns=[...]; a column of ids is named by "
            "dataset.id_column."
        )
    for field in kept:
        if problem := _unwritable(field.type, options.compression):
            raise UsageError(
                f"The input's column {field.name!r} has the type {field.type}, which cannot be written to Parquet "
                f"({problem}). Leave it out with dataset.columns=[...]."
            )
    return schema


def _check_options(options: WriteConfig) -> None:
    if not options.response_column:
        raise UsageError("write.response_column is empty: expected the name of a column.")
    if problem := _unwritable(pa.string(), options.compression):
        raise UsageError(f"write.compression={options.compression}: {problem}. Try zstd, snappy, gzip, lz4 or none.")


def _unwritable(type_: pa.DataType, compression: str) -> str | None:
    """Why a column cannot take the way of all columns (values, journal, sorted, Parquet); None if it can."""
    try:
        table = pa.table({"column": pa.array([None], type_)}).take(pa.array([0]))
        pq.write_table(table, pa.BufferOutputStream(), compression=compression)
    except (pa.ArrowException, OSError, ValueError, TypeError) as problem:
        return str(problem).rstrip(".")
    return None


def journal_row(answer: Answer, columns: Mapping[str, Any], schema: OutputSchema, attempt: int) -> dict[str, Any]:
    """One line of a journal: an answer and the input columns of its row."""
    facts, fault = answer.facts, answer.fault
    kept = {field.name: columns.get(field.name) for field in schema.inputs}
    if schema.image_column is not None and facts.image_bytes:
        images = zip(columns[schema.image_column], facts.image_bytes, strict=True)
        kept[schema.image_column] = [image | {"bytes": data} for image, data in images]
    return {
        "id": answer.id,
        "row_index": answer.key.row_index,
        "prompt_name": answer.key.prompt_name,
        "sample_index": answer.key.sample_index,
        "row_key": facts.row_key,
        "status": "error" if fault else "ok",
        "error_stage": str(fault.stage) if fault else None,
        "error_type": fault.kind if fault else None,
        "error_message": fault.message if fault else None,
        "warnings": list(facts.warnings),
        "prompt": facts.prompt,
        "response": answer.response,
        "response_json": answer.response_json,
        "parse_ok": answer.parse_ok,
        "finish_reason": str(answer.finish_reason) if answer.finish_reason else None,
        "num_prompt_tokens": facts.num_prompt_tokens,
        "num_image_tokens": facts.num_image_tokens,
        "num_generated_tokens": answer.num_generated_tokens,
        "num_images": facts.num_images,
        "image_sha256": list(facts.image_sha256),
        "image_width": list(facts.image_width),
        "image_height": list(facts.image_height),
        "attempt": attempt,
    } | {f"input.{name}": value for name, value in kept.items()}

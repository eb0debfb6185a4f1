"""The columns of the output: what they are called, and what is refused before a model loads."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import UsageError
from pipeline.write.schema import ShardSummary, WriteConfig, output_schema

INPUT = pa.schema([("path", pa.string()), ("year", pa.int64())])


def columns(*names: str) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])


def test_the_id_comes_first_then_the_inputs_columns_then_ours() -> None:
    names = output_schema(WriteConfig(), INPUT).published.names
    assert names[:4] == ["id", "path", "year", "row_index"]
    assert names[-4:] == ["attempt", "model_id", "model_revision", "run_id"]


def test_an_input_column_with_one_of_our_names_is_refused_and_a_prefix_offered() -> None:
    with pytest.raises(UsageError, match=r"\['prompt', 'status'\].*write\.prefix=vlm_.*dataset\.columns"):
        output_schema(WriteConfig(), columns("status", "x", "prompt"))
    names = output_schema(WriteConfig(prefix="vlm_"), columns("status", "x", "prompt")).published.names
    assert names[:5] == ["vlm_id", "status", "x", "prompt", "vlm_row_index"]
    names = output_schema(WriteConfig(), columns("status", "x", "prompt"), keep=["x"]).published.names
    assert names[:3] == ["id", "x", "row_index"]


def test_the_column_that_names_the_rows_may_be_called_id() -> None:
    assert output_schema(WriteConfig(), columns("id", "x"), id_column="id").published.names[:3] == [
        "id",
        "x",
        "row_index",
    ]
    with pytest.raises(UsageError, match=r"\['id'\]"):
        output_schema(WriteConfig(), columns("id", "x"), id_column="x")


def test_the_response_may_have_another_name_unless_it_is_taken() -> None:
    schema = output_schema(WriteConfig(response_column="caption"), columns("response"))
    assert {"caption", "response"} <= set(schema.published.names)
    assert schema.column("response") == "caption"
    with pytest.raises(UsageError, match="another output column"):
        output_schema(WriteConfig(response_column="status"), INPUT)
    with pytest.raises(UsageError, match="year"):
        output_schema(WriteConfig(response_column="year"), INPUT)


def test_a_kept_column_that_is_not_there_is_an_error_with_the_columns() -> None:
    with pytest.raises(UsageError, match=r"'yaer'.*\['path', 'year'\]"):
        output_schema(WriteConfig(), INPUT, keep=["yaer"])


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstdd"},
        {"response_column": ""},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused_by_its_key(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"write.{next(iter(options))}"):
        output_schema(WriteConfig(**options), INPUT)


@pytest.mark.parametrize(
    "type_", [pa.struct([]), pa.month_day_nano_interval(), pa.dense_union([pa.field("a", pa.int8())])]
)
def test_a_type_that_parquet_cannot_hold_is_refused_by_its_column(type_: pa.DataType) -> None:
    schema = INPUT.append(pa.field("odd", type_))
    with pytest.raises(UsageError, match=r"'odd'.*dataset\.columns"):
        output_schema(WriteConfig(), schema)
    assert "odd" not in output_schema(WriteConfig(), schema, keep=["year"]).published.names


def test_a_summary_survives_the_footer_and_nothing_else_is_taken_for_one() -> None:
    summary = ShardSummary("p", 3, 10, 1, {"decode/X": 1}, 99, {"engine": "static"})
    assert ShardSummary.from_metadata(summary.to_metadata()) == summary
    for raw in (b"", b"[]", b"{}", b"\xff", b'{"plan_id": "p"}', b"null"):
        assert ShardSummary.from_metadata({b"vlm_batch": raw}) is None
    assert ShardSummary.from_metadata({}) is None
    assert ShardSummary.from_metadata(None) is None

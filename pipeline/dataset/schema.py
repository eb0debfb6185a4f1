"""One Arrow type for all the JSON values of a column.

    null < bool < int64 < float64      list of T      struct, with every key that occurs

Types that do not agree make the column text: strings as they are, every other value as its JSON text.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.types as types

_INT64 = 1 << 63
_EXACT_FLOAT = 1 << 53  # whole numbers up to here survive float64
_MAX_FIELDS = 256  # a dict with more keys than this is a dictionary, not a struct


class Seen:
    """The types of the values that a column, a list or a struct field has had so far."""

    __slots__ = ("fields", "items", "kinds", "largest")

    def __init__(self) -> None:
        self.kinds: set[type] = set()
        self.largest = 0  # the largest whole number, sign left out
        self.items: Seen | None = None
        self.fields: dict[str, Seen] = {}

    def add(self, value: Any) -> None:
        kind = type(value)
        self.kinds.add(kind)
        if kind is int and not -self.largest <= value <= self.largest:
            self.largest = abs(value)
        elif kind is list:
            self.items = self.items or Seen()
            for item in value:
                self.items.add(item)
        elif kind is dict:
            for name, item in value.items():
                self.fields.setdefault(name, Seen()).add(item)

    def type(self) -> pa.DataType:
        """The Arrow type that holds them all."""
        kinds = self.kinds - {type(None)}
        if not kinds:
            return pa.null()
        if kinds == {list} and self.items is not None:
            return pa.list_(self.items.type())
        if kinds == {dict} and 0 < len(self.fields) <= _MAX_FIELDS:  # Parquet has no struct without fields
            return pa.struct([pa.field(name, seen.type()) for name, seen in self.fields.items()])
        if kinds == {bool}:
            return pa.bool_()
        if int in kinds and kinds <= {bool, int} and self.largest < _INT64:
            return pa.int64()
        if kinds <= {bool, int, float} and self.largest <= _EXACT_FLOAT:
            return pa.float64()
        return pa.string()

    def is_mixed(self) -> bool:
        """Whether values became text, here or further inside, because their types did not agree."""
        inner = [*self.fields.values(), *([self.items] if self.items else [])]
        mixed = types.is_string(self.type()) and not self.kinds <= {str, type(None)}
        return mixed or any(seen.is_mixed() for seen in inner)


def conformed(value: Any, type_: pa.DataType) -> Any:
    """A JSON value as the value that a column of this type has."""
    if value is None:
        return None
    if types.is_string(type_):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if types.is_list(type_):
        return [conformed(item, type_.value_type) for item in value]
    if types.is_struct(type_):
        fields = (type_.field(number) for number in range(type_.num_fields))
        return {field.name: conformed(value.get(field.name), field.type) for field in fields}
    if types.is_floating(type_):
        return float(value)
    return int(value) if types.is_integer(type_) else value

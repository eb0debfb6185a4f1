"""What an answer has to be, from the options: which are refused, what a schema means, and what JSON comes out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.vlm.constraint import canonical_json, choices_problem, constraint_of, is_constrained, schema_text
from pipeline.vlm.generation import effective_settings
from pipeline.vlm.grammar import check_constraint
from pipeline.vlm.options import GreedyConfig, SampleConfig

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as it is compiled, without the layout."""
    constraint = constraint_of(GreedyConfig(json_schema=json.dumps(schema)))
    assert constraint is not None and constraint.schema is not None
    found = json.loads(constraint.schema)
    del found["x-guidance"]
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"regex": "a", "choices": ["b"]}, "generation.regex and generation.choices are set"),
        ({"regex": "a", "ignore_eos": True}, "generation.ignore_eos=true goes on"),
        ({"regex": ""}, "generation.regex is empty"),
        ({"choices": []}, "expected a list of texts"),
        ({"choices": ["yes", "yes"]}, "stands there twice"),
        ({"choices": ["yes", " no"]}, "' no' is empty, or has white space around it"),
        ({"json_schema": "no.json"}, r"generation.json_schema=no.json: expected a JSON object, or the path"),
        ({"json_schema": "{"}, "generation.json_schema is no JSON: .*line 1 column 2"),
        ({"json_schema": "/dev/zero"}, "no regular file"),
        ({"json_schema": '{"enum": [[9007199254740993]]}'}, "holds 9007199254740993: whole numbers beyond 2.53"),
        ({"json_schema": '{"type": "object"}', "extra": {"num_beams": 2}}, r"search over beams \(num_beams=2\)"),
        ({"choices": ["a"], "extra": {"forced_bos_token_id": 5}}, "and so does forced_bos_token_id=5"),
    ],
)
def test_what_has_no_meaning_is_refused_with_its_key(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        effective_settings(GreedyConfig(**options), {})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"regex": "(a"}, "generation.regex=.a cannot be compiled: unclosed group.* whole answer matches"),
        ({"regex": "^a$"}, "generation.regex=.a. cannot be compiled: lookarounds not supported yet"),
        (
            {"json_schema": '{"properties": {"a": {"items": {"type": "text"}}}}'},
            "generation.json_schema cannot be compiled: Invalid type: text, at #/properties/a/items",
        ),
        (
            {"json_schema": '{"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"format": "postal"}}}'},
            "Unknown format: postal, at #/.defs/b",
        ),
        (
            {"json_schema": '{"type": "object", "properties": {}, "required": ["a"]}'},
            "required property 'a' is unsatisfiable, at #",
        ),
        ({"json_schema": '{"propertyNames": {"pattern": "a"}}'}, 'Unimplemented keys: ."propertyNames"'),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_its_place_named(options: dict[str, Any], said: str) -> None:
    constraint = constraint_of(GreedyConfig(**options))
    assert constraint is not None
    with pytest.raises(UsageError, match=said):
        check_constraint(constraint)


def test_the_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for options in (GreedyConfig(choices=["a"]), GreedyConfig(choices_column="options")):
        constraint = constraint_of(options)
        assert constraint is not None
        with pytest.raises(UsageError, match=r"pip install 'vlm-batch\[structured\]'"):
            check_constraint(constraint)


def test_free_answers_are_not_constrained() -> None:
    assert constraint_of(SampleConfig()) is None
    assert not is_constrained({"generation.choices": None, "generation.n": 1})
    assert is_constrained({"generation.regex": "a"})


def test_the_fingerprint_holds_the_content_of_a_schema_and_the_order_of_its_keys(tmp_path: Path) -> None:
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text(json.dumps(PERSON, indent=3), encoding="utf-8")
    other.write_text(json.dumps(PERSON | {"properties": dict(reversed(PERSON["properties"].items()))}))  # type: ignore[attr-defined]
    inline = schema_text(GreedyConfig(json_schema=json.dumps(PERSON)))
    assert schema_text(GreedyConfig(json_schema=str(path))) == inline
    assert schema_text(GreedyConfig(json_schema=str(other))) != inline
    assert schema_text(GreedyConfig()) is None


def test_an_object_that_lists_properties_takes_no_others() -> None:
    assert closed(PERSON)["additionalProperties"] is False
    nested = {"items": PERSON, "$defs": {"p": PERSON}}
    assert (
        closed(nested)["items"]["additionalProperties"] is closed(nested)["$defs"]["p"]["additionalProperties"] is False
    )
    # A property may have the name of a keyword.
    assert "additionalProperties" not in closed({"properties": {"properties": {"type": "string"}}})["properties"]


@pytest.mark.parametrize(
    "schema",
    [
        PERSON | {"additionalProperties": {"type": "string"}},
        PERSON | {"patternProperties": {"^x": {"type": "string"}}},
        {"type": "object"},
        {"allOf": [PERSON, {"properties": {"city": {"type": "string"}}}]},
        PERSON | {"anyOf": [{"properties": {"city": {"type": "string"}}, "required": ["city"]}, {"required": ["age"]}]},
    ],
)
def test_an_object_that_says_so_or_is_a_part_of_another_stays_open(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


def test_a_layout_of_ones_own_is_kept() -> None:
    constraint = constraint_of(GreedyConfig(json_schema=json.dumps(PERSON | {"x-guidance": {"key_separator": " = "}})))
    assert constraint is not None and constraint.schema is not None
    layout = json.loads(constraint.schema)["x-guidance"]
    assert (layout["key_separator"], layout["whitespace_flexible"]) == (" = ", False)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (' {"b": 1.50, "a": [true, null]}', '{"a":[true,null],"b":1.5}'),
        ('"caf\\u00e9 \\ud83d\\ude00"', '"café 😀"'),
        ('"\\ud800"', '"\\ud800"'),  # half a pair: no text, but JSON
        ("12345678901234567890123", "12345678901234567890123"),
        ("1e999", None),
        ("9" * 5000, None),
        ("NaN", None),
        ('{"a": 1', None),
        ("[" * 100_000, None),
    ],
)
def test_canonical_json_of_an_answer(text: str, found: str | None) -> None:
    assert canonical_json(text) == found
    if found is not None:
        found.encode()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_equal_values_have_equal_texts_that_give_them_back(value: Any) -> None:
    text = canonical_json(json.dumps(value, indent=2))
    assert text is not None and json.loads(text) == value
    assert canonical_json(text) == text == canonical_json(json.dumps(value, ensure_ascii=False, sort_keys=True))


def test_choices_are_texts_that_a_response_can_be() -> None:
    assert choices_problem(["a", "b c", "ß", "(x|y)"]) is None
    assert choices_problem(["a\n"]) is not None

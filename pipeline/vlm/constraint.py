"""What every answer of a run has to be: JSON of a schema, one of some texts, or a text of a pattern. No torch here.

A schema keeps the order of its keys, which is the order in which an answer names them. An object that lists its
`properties` takes no others unless it says so itself: a model that may invent properties does not come to an end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.vlm.options import GenerationConfig

KEYS = ("json_schema", "regex", "choices", "choices_column")  # of generation; one of them at most is set

_META = re.compile(r"[\\.+*?()|\[\]{}^$#&~/\-]")
# One blank may stand behind a comma or a colon, as json.dumps writes; none elsewhere. More freedom, and a model may
# write blanks without end; less, and arrays end early, as the token that the model wants for "go on" has a blank in it.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMAS = (
    *("items", "prefixItems", "additionalProperties", "contains"),
    *("allOf", "anyOf", "oneOf", "not", "if", "then", "else"),
)
# Beside one of these the properties of an object are a part of a whole that may have others.
_WHOLES = ("anyOf", "oneOf", "$ref", "if", "not", "dependentSchemas")


@dataclass(frozen=True, slots=True)
class Constraint:
    """Of a run. One of the three is set, or none: then each row has choices of its own."""

    key: str  # the configuration key that it comes from
    schema: str | None = None  # JSON Schema as JSON text
    pattern: str | None = None  # regular expression for the whole answer
    choices: tuple[str, ...] = ()

    @property
    def is_json(self) -> bool:
        return self.schema is not None

    @property
    def is_shared(self) -> bool:
        """Whether all rows have the same."""
        return self.is_json or self.pattern is not None or bool(self.choices)


def is_constrained(settings: Mapping[str, Any]) -> bool:
    """Whether the answers of a plan with these settings are; then the output has columns for what they say."""
    return any(settings.get(f"generation.{name}") is not None for name in KEYS)


def constraint_of(options: GenerationConfig) -> Constraint | None:
    """What the options ask for; None where answers are free.

    Raises:
        UsageError: several are set, or one has no meaning; or another option cannot hold beside it.
    """
    given = [name for name in KEYS if getattr(options, name) is not None]
    if not given:
        return None
    key = f"generation.{given[0]}"
    if len(given) > 1:
        raise UsageError(f"generation.{' and generation.'.join(given)} are set: an answer can obey one of them.")
    if options.ignore_eos:
        raise UsageError(f"{key} ends an answer where it is complete, and generation.ignore_eos=true goes on.")
    if options.json_schema is not None:
        schema = schema_of(options.json_schema)
        if number := next(_large_numbers(schema), None):
            raise UsageError(
                f"{key} holds {number}: whole numbers beyond 2^53 are not told apart where the schema is compiled, in "
                "double precision. Have the answer be a text instead."
            )
        return Constraint(key, schema=json.dumps(_laid_out(schema)))
    if options.regex is not None:
        if not options.regex:
            raise UsageError(f"{key} is empty: expected a regular expression that the whole answer matches.")
        return Constraint(key, pattern=options.regex)
    if options.choices is not None:
        if problem := choices_problem(options.choices):
            raise UsageError(f"{key}={options.choices}: {problem}.")
        return Constraint(key, choices=tuple(options.choices))
    return Constraint(key)


def schema_text(options: GenerationConfig) -> str | None:
    """The schema of generation.json_schema as JSON text, for the fingerprint: its content, not where it lies.

    Raises:
        UsageError: as `schema_of`.
    """
    if options.json_schema is None:
        return None
    return json.dumps(schema_of(options.json_schema), ensure_ascii=False)


def schema_of(value: str) -> dict[str, Any]:
    """generation.json_schema, which is a JSON object or the path of a file that holds one.

    Raises:
        UsageError: it is neither.
    """
    inline = value.lstrip().startswith("{")
    name = "generation.json_schema" if inline else f"generation.json_schema={value}"
    text = value
    if not inline:
        path = Path(value).expanduser()
        try:
            if path.exists() and not path.is_file():  # a device has no end, a pipe perhaps no beginning
                raise OSError("it is no regular file")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise UsageError(f"{name}: expected a JSON object, or the path of a .json file ({problem}).") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise UsageError(f"{name} is no JSON: {problem or type(problem).__name__}.") from None
    if not isinstance(found, dict):
        raise UsageError(f'{name}: expected a JSON object, such as {{"type": "object", ...}}; it is {text[:60]!r}.')
    return found


def choices_problem(choices: Sequence[str]) -> str | None:
    """Why texts cannot be the choices of an answer; None where they can."""
    if not choices:
        return "expected a list of texts, one of which is the answer"
    for text in choices:
        if not text or text != text.strip():
            return f"{text!r} is empty, or has white space around it, which no response has"
    if len(set(choices)) < len(choices):
        return "a text stands there twice"
    return None


def pattern_of(choices: Sequence[str]) -> str:
    """The regular expression that these texts match, and no others."""
    return "|".join(_META.sub(r"\\\g<0>", text) for text in choices)


def canonical_json(text: str) -> str | None:
    """A JSON text with sorted keys and without blanks: equal values give equal texts. None where it is no JSON.

    Nor is what JSON cannot give back: a number beyond those of double precision, or of more than 4,300 digits.
    """
    try:
        value = json.loads(text)
        written = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
        written.encode()
        return written
    except UnicodeEncodeError:  # half a surrogate pair, as an escape
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return None


def parts_of(schema: Any, pointer: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and all within it, each with its JSON pointer."""
    if not isinstance(schema, dict):
        return
    yield pointer, schema
    for name in (*_SCHEMAS, *_SCHEMA_MAPS):
        found = schema.get(name)
        if isinstance(found, list):
            for number, part in enumerate(found):
                yield from parts_of(part, f"{pointer}/{name}/{number}")
        elif name in _SCHEMAS:
            yield from parts_of(found, f"{pointer}/{name}")
        elif isinstance(found, dict):
            for key, part in found.items():
                yield from parts_of(part, f"{pointer}/{name}/{key}")


def _large_numbers(value: Any) -> Iterator[int]:
    """Whole numbers that double precision may change."""
    if isinstance(value, int) and abs(value) > 1 << 53:
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _large_numbers(part)


def _laid_out(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with our layout, where it has none of its own under x-guidance, and closed objects."""
    schema = json.loads(json.dumps(schema))
    own = schema.get("x-guidance")
    parts = [part for _, part in parts_of(schema)]
    if not any("allOf" in part or ("properties" in part and any(name in part for name in _WHOLES)) for part in parts):
        for part in parts:
            if "properties" in part and not {"additionalProperties", "patternProperties"} & part.keys():
                part["additionalProperties"] = False
    return schema | {"x-guidance": _LAYOUT | (own if isinstance(own, dict) else {})}

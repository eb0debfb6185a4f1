"""How an option of the configuration is declared: a default, a sentence for --help, and what it may change."""

from __future__ import annotations

from dataclasses import MISSING, Field, field
from typing import Any


def option(
    default: Any = MISSING,
    doc: str = "",
    *,
    speed: bool = False,
    least: float | None = None,
    most: float | None = None,
    factory: Any = MISSING,
) -> Any:
    """A dataclass field that is a configuration key.

    doc: one sentence for `--help`, units included.
    speed: the option changes how fast answers come, never what they say. Every other option is part of the plan's
        fingerprint, so forgetting the flag costs a refused resume, not a mixed dataset.
    least, most: the range of a number; compose() refuses what lies outside.
    factory: makes the default where it is a list or a dict.
    """
    metadata = {"doc": doc, "speed": speed, "least": least, "most": most}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def range_problem(entry: Field[Any], value: Any) -> str | None:
    """What is wrong with a number that lies outside the option's range; None where nothing is."""
    least, most = entry.metadata.get("least"), entry.metadata.get("most")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if least is not None and not value >= least:
        return f"expected at least {least:g}"
    if most is not None and not value <= most:
        return f"expected at most {most:g}"
    return None


def doc_of(entry: Field[Any]) -> str:
    """The sentence with which an option was declared."""
    return str(entry.metadata.get("doc", ""))


def is_speed_only(entry: Field[Any]) -> bool:
    """Whether an option stays out of the fingerprint."""
    return bool(entry.metadata.get("speed", False))

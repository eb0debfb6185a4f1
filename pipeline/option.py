"""How an option of the configuration is declared: a default, a sentence for --help, and what it may change."""

from __future__ import annotations

from dataclasses import MISSING, Field, field
from typing import Any


def option(default: Any = MISSING, doc: str = "", *, speed: bool = False, factory: Any = MISSING) -> Any:
    """A dataclass field that is a configuration key.

    doc: one sentence for `--help`, units included.
    speed: the option changes how fast answers come, never what they say. Every other option is part of the plan's
        fingerprint, so forgetting the flag costs a refused resume, not a mixed dataset.
    factory: makes the default where it is a list or a dict.
    """
    if factory is not MISSING:
        return field(default_factory=factory, metadata={"doc": doc, "speed": speed})
    return field(default=default, metadata={"doc": doc, "speed": speed})


def doc_of(entry: Field[Any]) -> str:
    """The sentence with which an option was declared."""
    return str(entry.metadata.get("doc", ""))


def is_speed_only(entry: Field[Any]) -> bool:
    """Whether an option stays out of the fingerprint."""
    return bool(entry.metadata.get("speed", False))

"""What two runs were made with, and where that differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.diff.side import Side
from pipeline.plan import Plan


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting, a version or the like, and its values; None = it is not set, or not known."""

    name: str
    a: Any
    b: Any


def setting_differences(a: Side, b: Side) -> list[Difference]:
    """What the plans' settings differ in, field by field; of prompts those that are compared."""
    if a.results.plan is None or b.results.plan is None:
        return []
    return _differences(_settings(a, a.results.plan), _settings(b, b.results.plan))


def version_differences(a: Side, b: Side) -> list[Difference]:
    """Packages that were installed in other versions when the plans were made."""
    if a.results.plan is None or b.results.plan is None:
        return []
    return _differences(a.results.plan.versions, b.results.plan.versions)


def numeric_differences(a: Side, b: Side) -> list[Difference]:
    """What else may change last digits: engine, kernels, device, as the shards' footers say; values of several shards
    stand beside each other."""
    if a.results.plan is None or b.results.plan is None:
        return []
    return _differences(_numerics(a), _numerics(b))


def models(side: Side) -> list[str]:
    """The models that the records name, with their revisions."""
    names = [name for name in ("model_id", "model_revision") if name in side.results.names]
    if "model_id" not in names:
        return []
    found: dict[str, None] = {}
    paths = side.results.files[:1] if side.results.plan else side.results.files  # a plan has one model
    for path in paths:
        for row in side.results.table(path, names).group_by(names, use_threads=False).aggregate([]).to_pylist():
            found[" ".join(str(value) for value in row.values() if value is not None)] = None
    return [*found]


def _settings(side: Side, plan: Plan) -> dict[str, Any]:
    """The settings of a plan, dictionaries taken apart; the text of a chosen prompt as `prompt`."""
    settings = dict(plan.settings)
    variants = settings.get("prompt.variants") or {}
    if side.prompt is not None and side.prompt in variants:
        settings["prompt.user"] = variants[side.prompt]
        del settings["prompt.variants"]
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            flat[name] = value
    return flat


def _numerics(side: Side) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for summary in side.results.summaries.values():
        for name, value in summary.numerics.items():
            found.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(sorted(values)) for name, values in found.items()}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    names = sorted(a.keys() | b.keys())
    return [Difference(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]

"""A comparison as numbers: what diff.json holds, and what the terminal and the page show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.diff.change import Change
from pipeline.diff.comparison import Comparison, Numbers
from pipeline.diff.provenance import models, numeric_differences, setting_differences, version_differences
from pipeline.diff.scores import Scores
from pipeline.diff.side import Side

_MOST_VALUES = 1000  # of a column; each costs a bootstrap for each metric


def summary(a: Side, b: Side, comparison: Comparison, scores: Scores | None, *, seed: int) -> dict[str, Any]:
    """Everything that was counted, as JSON values. seed: of the bootstrap."""
    pairs = comparison.pairs
    return {
        "a": _side(a, b, len(pairs) + len(pairs.only_in_a)),
        "b": _side(b, a, len(pairs) + len(pairs.only_in_b)),
        "joined_by": pairs.key,
        "num_records": comparison.num_records,
        "num_compared": len(pairs),
        "share_same": comparison.share_same,
        "changes": {change.word: comparison.num(change) for change in Change},
        "similarity": _spread(_known(comparison.similarity)),
        "num_generated_tokens": _lengths(*comparison.tokens),
        "finish_reasons": [
            {"a": one, "b": other, "num_records": number}
            for (one, other), number in sorted(comparison.finish_reasons.items(), key=lambda entry: -entry[1])
        ],
        "errors": [
            {"a": one, "b": other, "num_records": number}
            for (one, other), number in sorted(comparison.errors.items(), key=lambda entry: -entry[1])
        ],
        "images": {"num_records": comparison.num_images, "num_different": comparison.num_other_images},
        "prompts": {"num_records": comparison.num_prompts, "num_different": comparison.num_other_prompts},
        "settings": [asdict(entry) for entry in setting_differences(a, b)],
        "versions": [asdict(entry) for entry in version_differences(a, b)],
        "numerics": [asdict(entry) for entry in numeric_differences(a, b)],
        "scores": scores.of(seed=seed) if scores else {},
        "by": {name: _by(comparison, name, scores, seed) for name in comparison.groups},
    }


def _side(side: Side, other: Side, num_compared: int) -> dict[str, Any]:
    plan = side.results.plan
    return {
        "label": _label(side, other),
        "path": str(side.results.path),
        "run_id": plan.plan_id if plan else None,
        "models": models(side),
        "prompt_names": [*side.prompt_names],
        "response_column": side.response,
        "num_records": num_compared,
        "num_published": side.results.num_records,
        "num_planned": plan.num_records if plan else None,
    }


def _label(side: Side, other: Side) -> str:
    """A short name: what tells the two apart."""
    if side.results.path == other.results.path and side.prompt_names != other.prompt_names:
        return ", ".join(side.prompt_names)
    if side.results.path == other.results.path and side.response != other.response:
        return side.response.removeprefix("input.")
    return side.results.path.name or str(side.results.path)


def _spread(values: Any) -> dict[str, float | None]:
    """Mean and quantiles; None where there are no values."""
    if not len(values):
        return dict.fromkeys(("mean", "lowest", "p5", "median"))
    lowest, p5, median = np.quantile(values, (0, 0.05, 0.5))
    return {"mean": float(values.mean(dtype=float)), "lowest": float(lowest), "p5": float(p5), "median": float(median)}


def _lengths(a: Numbers, b: Numbers) -> dict[str, Any] | None:
    """Of answers whose number of tokens is known on both sides; None where there is none."""
    known = ~(np.isnan(a) | np.isnan(b))
    if not known.any():
        return None
    a, b = a[known], b[known]
    sides = {}
    for name, values in (("a", a), ("b", b)):
        median, p95, most = np.quantile(values, (0.5, 0.95, 1))
        sides[name] = {
            "mean": float(values.mean()),
            "median": float(median),
            "p95": float(p95),
            "most": int(most),
            "total": int(values.sum()),
        }
    longer, shorter = int(np.count_nonzero(b > a)), int(np.count_nonzero(b < a))
    return {"num_records": len(a), **sides, "num_longer_in_b": longer, "num_shorter_in_b": shorter}


def _by(comparison: Comparison, name: str, scores: Scores | None, seed: int) -> Mapping[str, Any]:
    """The largest groups of a column."""
    groups = comparison.groups[name]
    return {
        "num_values": len(groups),
        "values": [
            {
                "value": value,
                "num_records": len(numbers),
                "changes": _counts(comparison, numbers),
                "similarity": _spread(_known(comparison.similarity[numbers])),
                "num_generated_tokens": _lengths(*(tokens[numbers] for tokens in comparison.tokens)),
                "scores": scores.of(numbers, seed=seed) if scores else {},
            }
            for value, numbers in groups.largest(_MOST_VALUES)
        ],
    }


def _counts(comparison: Comparison, numbers: Any) -> dict[str, int]:
    found = np.bincount(comparison.change[numbers], minlength=len(Change))
    return {change.word: int(found[change]) for change in Change if change < Change.ONLY_IN_A}


def _known(values: Any) -> Any:
    return values[~np.isnan(values)]

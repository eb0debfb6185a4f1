"""The metrics by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from pipeline.errors import UsageError
from pipeline.score.exact_match import ExactMatch, ExactMatchNormalized
from pipeline.score.metric import Metric

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (ExactMatch(), ExactMatchNormalized())}


def metrics_named(names: Sequence[str]) -> list[Metric]:
    """The metrics with these names, each once.

    Raises:
        UsageError: there is none of that name (with the nearest), or no name.
    """
    if not names:
        raise UsageError(f"metric=: expected one or more of {', '.join(METRICS)}.")
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"metric={name}: there is no such metric.{hint} Metrics: {', '.join(METRICS)}.")
    return [METRICS[name] for name in dict.fromkeys(names)]

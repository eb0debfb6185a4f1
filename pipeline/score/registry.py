"""The metrics by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from pipeline.errors import UsageError
from pipeline.score.anls import Anls
from pipeline.score.bleu import Bleu
from pipeline.score.choice import Choice
from pipeline.score.chrf import Chrf
from pipeline.score.cider import Cider
from pipeline.score.exact_match import ExactMatch, ExactMatchNormalized
from pipeline.score.metric import Metric
from pipeline.score.relaxed_accuracy import RelaxedAccuracy
from pipeline.score.rouge_l import RougeL
from pipeline.score.vqa_accuracy import VqaAccuracy
from pipeline.score.yes_no import YesNo

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        ExactMatch(),
        ExactMatchNormalized(),
        VqaAccuracy(),
        Anls(),
        RelaxedAccuracy(),
        Choice(),
        YesNo(),
        Bleu(),
        Chrf(),
        RougeL(),
        Cider(),
    )
}


def metrics_named(names: Sequence[str]) -> list[Metric]:
    """The metrics with these names, each once.

    Raises:
        UsageError: there is none of that name (with the nearest).
    """
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"metric={name}: there is no such metric.{hint} Metrics: {', '.join(METRICS)}.")
    return [METRICS[name] for name in dict.fromkeys(names)]

"""A metric of some answers, as tests ask for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.score import METRICS, Cases


def value(
    name: str,
    responses: Sequence[str | None],
    references: Sequence[Sequence[str]],
    options: Sequence[Sequence[str]] | None = None,
) -> float:
    metric = METRICS[name].learned(references)
    sums = metric.rows(Cases(responses, references, options)).sum(0, keepdims=True)
    return float(metric.value(sums, np.array([len(responses)]))[0])


def row_scores(name: str, responses: Sequence[str | None], references: Sequence[Sequence[str]]) -> list[float]:
    metric = METRICS[name].learned(references)
    return [float(score) for score in metric.row_scores(metric.rows(Cases(responses, references)))]


# google-research/pix2struct, pix2struct/metrics_test.py, test_pix2struct_metrics: with exact_match 12.5, anls 47.5,
# relaxed_accuracy 62.5 and cider 128.6, all times 100.
PIX2STRUCT = ["abc", "abc", "Abc", "100%", "100%", "100%", "100%", "Don't"]
PIX2STRUCT_REFERENCES = [["abc"], ["Abc"], ["abc"], ["96%"], ["94%"], ["0.96"], ["0.94"], ["Won't"]]

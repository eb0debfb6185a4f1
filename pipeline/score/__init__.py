"""Answers held against references: metrics, their statistics of each record, and bootstrap intervals.

    metric = METRICS["bleu"].learned(references)        only cider learns anything; the others give themselves
    statistics_NS = metric.rows(Cases(responses, references))
    interval(metric, statistics_NS, clusters_N)         value, low, high
    paired_interval(metric, a_NS, b_NS, clusters_N)     of the difference b - a

N: records, S: the statistics of a metric. The value of a metric is a function of the sum of its statistics over the
records and of their number, so that an interval never looks at a text twice.
"""

from pipeline.score.bootstrap import Interval, Resamples, interval, paired_interval
from pipeline.score.metric import Cases, Metric, UnusableCase
from pipeline.score.registry import METRICS, metrics_named

__all__ = [
    "METRICS",
    "Cases",
    "Interval",
    "Metric",
    "Resamples",
    "UnusableCase",
    "interval",
    "metrics_named",
    "paired_interval",
]

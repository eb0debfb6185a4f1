"""Scores as files: JSON with a value and an interval for each metric, and Parquet with a score for each record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RunFailed, UsageError
from pipeline.redaction import without_credentials
from pipeline.score.bootstrap import CONFIDENCE, NUM_RESAMPLES, Interval
from pipeline.score.options import ScoreOptions
from pipeline.score.predictions import default_output
from pipeline.score.scoring import Score, Scores
from pipeline.write.file import Place, place, replace_file


def write_scores(scores: Scores, options: ScoreOptions) -> list[Place]:
    """Write the files that the options ask for; which ones.

    Raises:
        UsageError: it is not said where to.
        RunFailed: one cannot be written.
    """
    output = place(options.score_output) if options.score_output else default_output(scores.table)
    if output is None:
        raise UsageError(f"score_output= is not set: there is no place beside {scores.table.path} for score.json.")
    files = {output: _json(scores, options)}
    if (rows := _rows_file(scores, options, output)) is not None:
        files[rows] = _parquet(scores)
    for path, content in files.items():
        try:
            replace_file(path, content, beside=path.parent, durable=False)
        except OSError as problem:
            raise RunFailed(
                f"{path} cannot be written: {problem.strerror or problem}. Name another file with score_output= and "
                "score_rows=."
            ) from problem
    return list(files)


def _rows_file(scores: Scores, options: ScoreOptions, output: Place) -> Place | None:
    """Beside predictions of others it is not made unasked: next to Parquet files it would be taken for one of them."""
    if options.score_rows:
        return place(options.score_rows)
    if scores.table.run is None:
        return None
    return output.parent / f"{output.name.removesuffix('.json')}_rows.parquet"


def _json(scores: Scores, options: ScoreOptions) -> bytes:
    found = {}
    run = scores.table.run
    # By these a reader knows whether the run has changed since.
    there = {} if run is None else {"num_records": run.num_records, "num_error_records": run.num_errors}
    for number, metric in enumerate(scores.metrics):
        entry = _entry(scores.overall[number]) | {
            **there,
            "num_without_reference": scores.num_without_reference,
            "num_unused_references": scores.num_unused_references,
            "num_repeated": scores.num_repeated,
            "response_column": scores.response_column,
            "reference": without_credentials(str(options.reference)),
            "reference_column": options.reference_column,
            "confidence": CONFIDENCE,
            "num_resamples": NUM_RESAMPLES,
            "seed": options.seed,
            "settings": dict(metric.settings()),
        }
        if options.by:
            entry["by"] = options.by
            entry["groups"] = [{"group": name} | _entry(of[number]) for name, of in scores.groups.items()]
        found[metric.name] = entry
    return (json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")


def _entry(score: Score) -> dict[str, Any]:
    """A metric of some records, its value and interval first."""
    return {
        **_interval(score.interval),
        "num_rows": score.num_rows,
        "num_errors": score.num_errors,
        **score.counts,
        **{name: _interval(part) for name, part in score.parts.items()},
    }


def _interval(interval: Interval) -> Mapping[str, float | None]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _parquet(scores: Scores) -> bytes:
    records = scores.records
    columns = {
        "id": pa.array([row_id.encode("utf-8", "replace").decode() for row_id in records.ids], pa.string()),
        "row_index": pa.array(records.row_indices, pa.int64()),
        "prompt_name": pa.array(records.prompt_names, pa.string()),
        "sample_index": pa.array(records.sample_indices, pa.int32()),
    }
    for metric, row_scores in zip(scores.metrics, scores.row_scores, strict=True):
        columns[metric.name] = pa.array(row_scores, pa.float64())
    content = BytesIO()
    pq.write_table(pa.table(columns), content, compression="zstd")
    return content.getvalue()

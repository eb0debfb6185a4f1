"""The parity check: before a long run its first rows are answered alone and as one batch, and compared.

Rows may differ in half precision, where a batch is summed in another order; how often is measured and reported. In
float32 they may not. Two things are wrong in any precision: a picture that changes nothing, and rows of a batch that
get each other's pictures. Both are looked for with one row asked about its picture, its negative, and a faded copy.

Shapes: S steps of an answer, V tokens of the vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from pipeline.errors import RunFailed
from pipeline.records import EncodedSample
from pipeline.vlm.base import Trace, TracingEngine

log = logging.getLogger(__name__)

# Largest logit difference, as a share of the largest logit, that float32 may show.
FLOAT32_BOUND = 1e-5
_MAX_STEPS = 16  # of each answer: a wrong position or a lost picture shows in the first few
_MAX_PICTURES = 3  # rows whose pictures are tried: one may be faded as it is
_FADED = 0.01  # of the contrast
_WAY_OUT = "engine.parity_rows=0 goes on without the check."
_ROW_BY_ROW = f"Set engine.max_batch_rows=1 to answer row by row; {_WAY_OUT}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What the check found: in the manifest under `parity`."""

    num_rows: int  # compared; rows that fail alone are left out
    num_failed_in_batch: int  # of rows that do not fail alone
    num_identical: int  # with the same tokens
    first_difference: dict[str, Any] | None  # row `id` and `step` of the earliest
    logit_error: float | None  # largest difference over the largest logit, as long as the tokens agree
    dtype: str
    num_pictures_changed: int | None  # rows whose answer hangs on their picture, of 3 tried; None without pictures


Expand = Callable[[EncodedSample], EncodedSample]


class ParityCheck:
    """Of one run: looks at its first rows, once. expanded: gives a sample whose images are tensors, not compact."""

    def __init__(self, engine: TracingEngine, *, num_rows: int, expanded: Expand | None = None) -> None:
        self._engine, self._num_rows, self._expanded = engine, num_rows, expanded
        self.result: Parity | None = None

    @property
    def report(self) -> dict[str, Any]:
        """For stats and manifest."""
        return {} if self.result is None else {"parity": asdict(self.result)}

    @property
    def num_due(self) -> int:
        """How many rows it wants to see."""
        return self._num_rows if self.result is None else 0

    def check(self, samples: Sequence[EncodedSample]) -> None:
        """Look at a run's first rows; without any nothing is checked.

        Raises:
            RunFailed: pictures do not reach the model, or go to the wrong rows; or float32 answers hang on the batch.
        """
        if not samples:
            return
        began, before = time.perf_counter(), self._engine.counts.trial_seconds
        self.result = check_parity(self._engine, samples, self._expanded)
        self._engine.counts.trial_seconds = before + time.perf_counter() - began  # the engine's own trials included


def check_parity(engine: TracingEngine, samples: Sequence[EncodedSample], expanded: Expand | None = None) -> Parity:
    """Answer samples alone and together, and compare.

    Raises:
        RunFailed: see ParityCheck.
    """
    samples = [replace(sample, max_new_tokens=_num_steps(engine, sample)) for sample in samples]
    alone = [engine.trace([sample])[0] for sample in samples]
    fit = [place for place, trace in enumerate(alone) if trace is not None]
    together = engine.trace([samples[place] for place in fit]) if fit else []
    pairs = [
        (samples[place], one, other)
        for place, other in zip(fit, together, strict=True)
        if (one := alone[place]) is not None and other is not None
    ]
    differences = [(sample.id, _first_difference(one, other)) for sample, one, other in pairs]
    apart = sorted((step, row) for row, step in differences if step is not None)
    errors = [error for _, one, other in pairs if (error := _logit_error(one, other)) is not None]
    result = Parity(
        num_rows=len(pairs),
        num_failed_in_batch=len(fit) - len(pairs),
        num_identical=len(pairs) - len(apart),
        first_difference={"id": apart[0][1], "step": apart[0][0]} if apart else None,
        logit_error=max(errors, default=None),
        dtype=engine.dtype,
        num_pictures_changed=_pictures(engine, samples, expanded),
    )
    _judge(result)
    return result


def _judge(result: Parity) -> None:
    error = result.logit_error or 0.0
    if result.dtype == "float32" and (error > FLOAT32_BOUND or result.first_difference):
        raise RunFailed(
            f"the parity check failed: in float32 {result.num_rows - result.num_identical} of {result.num_rows} rows "
            f"answer otherwise in a batch than alone, and logits differ by {error:.1e} of the largest (expected at "
            f"most {FLOAT32_BOUND:.0e}). {_ROW_BY_ROW}"
        )
    if result.num_failed_in_batch:
        log.warning(
            "parity: %d rows that can be answered alone fail in a batch; batches will be halved until they do not",
            result.num_failed_in_batch,
        )
    if not result.num_rows:
        return
    found = f"{result.num_identical} of {result.num_rows} rows say the same alone and in a batch"
    if result.first_difference:
        log.warning(
            "parity: %s; the first to differ is %s at token %d. In %s sums are rounded, so a near tie can fall either "
            "way (largest logit difference %.1e of the largest logit)",
            found,
            result.first_difference["id"],
            result.first_difference["step"],
            result.dtype,
            error,
        )
    elif result.logit_error is None:
        log.info("parity: %s; a search over beams shows no logits to compare", found)
    else:
        log.info("parity: %s (largest logit difference %.1e of the largest logit)", found, error)


def _pictures(engine: TracingEngine, samples: Sequence[EncodedSample], expanded: Expand | None) -> int | None:
    """How many of the rows tried answer otherwise once their pictures are gone.

    Raises:
        RunFailed: none does, or a row's logits in a batch are those of another row's picture.
    """
    num_tried = num_changed = 0
    pictured = (expanded(one) if expanded else one for one in samples if one.facts.num_images)
    for sample in islice(filter(_has_content, pictured), _MAX_PICTURES):
        # Two steps: some models' first token is the same for all (forced_bos_token_id).
        shown = [replace(one, max_new_tokens=2) for one in (sample, _repainted(sample, -1), _repainted(sample, _FADED))]
        alone = _telling_logits([trace for one in shown for trace in engine.trace([one])])
        together = _telling_logits(engine.trace(shown))
        if len(alone) < len(shown) or len(together) < len(shown):
            continue  # a row failed, and the run will record why; or the engine searches over beams
        num_tried += 1
        if torch.equal(alone[0], alone[2]):
            continue
        num_changed += 1
        for place, logits_V in enumerate(together):
            distances = [float((logits_V - one_V).abs().max()) for one_V in alone]
            if distances[place] > min(distances):
                raise RunFailed(
                    f"the parity check failed: in a batch, row {sample.id} gets the picture of another row. "
                    f"{_ROW_BY_ROW}"
                )
    if num_tried and not num_changed:
        raise RunFailed(
            f"the parity check failed: the model answers the same whether it sees the pictures of {num_tried} rows or "
            "faded ones, so they do not reach it. Look at vlm-batch preview show_prompt=true: are the image tokens "
            f"there? {_WAY_OUT}"
        )
    return num_changed if num_tried else None


def _has_content(sample: EncodedSample) -> bool:
    return any(bool(array.any()) for array in _pixels(sample).values())


def _repainted(sample: EncodedSample, factor: float) -> EncodedSample:
    """The sample with its pictures multiplied: zero stays zero, which some models take for "no picture here"."""
    painted = {name: array * array.dtype.type(factor) for name, array in _pixels(sample).items()}
    return replace(sample, tensors=dict(sample.tensors) | painted, image_key=None)


def _pixels(sample: EncodedSample) -> dict[str, np.ndarray[Any, Any]]:
    """What a processor gives as real numbers are pixels; tokens, masks and sizes are whole numbers."""
    return {name: array for name, array in sample.tensors.items() if array.dtype.kind == "f"}


def _num_steps(engine: TracingEngine, sample: EncodedSample) -> int:
    return min(_MAX_STEPS, sample.max_new_tokens or engine.max_new_tokens)


def _first_difference(one: Trace, other: Trace) -> int | None:
    if one.tokens == other.tokens:
        return None
    pairs = zip(one.tokens, other.tokens, strict=False)
    return next((step for step, (a, b) in enumerate(pairs) if a != b), min(len(one.tokens), len(other.tokens)))


def _logit_error(one: Trace, other: Trace) -> float | None:
    """Largest difference over the largest logit, up to and with the first token that differs."""
    num_steps = min(len(one.logits_SV), len(other.logits_SV))
    if (step := _first_difference(one, other)) is not None:
        num_steps = min(num_steps, step + 1)
    if not num_steps:
        return None
    a, b = torch.stack(one.logits_SV[:num_steps]), torch.stack(other.logits_SV[:num_steps])
    difference_SV = torch.where(a == b, 0.0, (a - b).abs())  # a token that is ruled out has -inf on both sides
    return float(difference_SV.max() / a[a.isfinite()].abs().max())


def _telling_logits(traces: Sequence[Trace | None]) -> list[torch.Tensor]:
    """Of each trace the logits [V] of the first step that leaves a choice; none for a trace without such a step."""
    found = []
    for trace in traces:
        choices = [logits_V for logits_V in (trace.logits_SV if trace else ()) if int(logits_V.isfinite().sum()) > 1]
        found += [choices[0].nan_to_num()] if choices else []
    return found

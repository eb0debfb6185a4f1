"""How the next token is chosen: one sampler for every engine.

Greedy takes the likeliest token. Sampling turns one uniform number per (seed, id, prompt_name, sample_index, step) into
a token by the inverse of the filtered distribution, so that an answer depends neither on its batch nor on its slot.
Filters come in transformers' order: repetition penalty, temperature, top_k, top_p, then its min_p, typical_p,
epsilon_cutoff and eta_cutoff.

Shapes: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
)

from pipeline.records import EncodedSample
from pipeline.vlm.generation import SamplingSettings

_MASK = (1 << 64) - 1
_WARPERS = {
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}


def row_seed(seed: int, sample: EncodedSample) -> int:
    """A row's own 64-bit seed."""
    name = f"{seed}\0{sample.id}\0{sample.key.prompt_name}\0{sample.key.sample_index}"
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) for one step of one row: splitmix64 (Steele, Lea, Flood 2014) over a counter."""
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return float((z ^ (z >> 31)) >> 11) / float(1 << 53)


class Sampler:
    """Chooses one token for each row."""

    def __init__(self, settings: SamplingSettings, seed: int) -> None:
        self.settings = settings
        self._seed = seed
        self._warpers = [kind(settings.warpers[name]) for name, kind in _WARPERS.items() if name in settings.warpers]

    @property
    def needs_history(self) -> bool:
        """Whether `seen_BV` is used at all."""
        return self.settings.repetition_penalty != 1.0

    def choose(
        self,
        logits_BV: torch.Tensor,
        samples: Sequence[EncodedSample],
        steps: Sequence[int],
        seen_BV: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of each row, and whether the row's logits were finite.

        steps: tokens that each row has already; seen_BV: tokens of its prompt and answer, padding left out.

        Returns:
            token_B int64, finite_B bool.
        """
        largest_B, token_B = logits_BV.max(-1)  # NaN and +inf win a maximum, so it tells for the whole row
        finite_B = torch.isfinite(largest_B)
        if not self.settings.do_sample and seen_BV is None:
            return token_B, finite_B
        logits_BV = logits_BV.float()
        if seen_BV is not None:
            penalty = self.settings.repetition_penalty
            penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
            logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
        if not self.settings.do_sample:
            return logits_BV.argmax(-1), finite_B
        drawn_B = [uniform(row_seed(self._seed, sample), step) for sample, step in zip(samples, steps, strict=True)]
        return self._draw(logits_BV, np.asarray(drawn_B)), finite_B

    def _draw(self, logits_BV: torch.Tensor, uniform_B: np.ndarray[Any, Any]) -> torch.Tensor:
        settings = self.settings
        if settings.temperature <= 0:
            return logits_BV.argmax(-1)
        # Stable: equal logits keep the order of their token ids, whatever the batch.
        sorted_BV, order_BV = torch.sort(logits_BV / settings.temperature, dim=-1, descending=True, stable=True)
        if settings.top_k:
            sorted_BV[:, settings.top_k :] = -torch.inf
        probability_BV = torch.softmax(sorted_BV.double(), -1)
        below_BV = probability_BV.cumsum(-1) - probability_BV  # mass of the likelier tokens
        probability_BV = torch.where(below_BV < settings.top_p, probability_BV, 0.0)
        if self._warpers:  # blind to the order of the tokens
            kept_BV = sorted_BV.nan_to_num().masked_fill(probability_BV == 0, -torch.inf)
            for warper in self._warpers:
                kept_BV = warper(None, kept_BV)
            probability_BV = torch.softmax(kept_BV.double(), -1)
        cumulative_BV = probability_BV.cumsum(-1)
        target_B1 = torch.from_numpy(uniform_B).to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
        place_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
        last_B1 = ((probability_BV > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # a row of NaN has no probability
        return order_BV.gather(-1, torch.minimum(place_B1, last_B1))[:, 0]

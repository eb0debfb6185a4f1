"""How the next token is chosen: one sampler for every engine.

Greedy takes the likeliest token. Sampling turns one uniform number per (seed, id, prompt_name, sample_index, step) into
a token by the inverse of the filtered distribution, so that an answer depends neither on its batch nor on its slot.
Filters come in transformers' order: repetition penalty, temperature, top_k, top_p.

Shapes: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.records import EncodedSample
from pipeline.vlm.options import GenerationConfig, SampleConfig

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """The effective settings: the checkpoint's generation_config overridden by generation.*."""

    do_sample: bool
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    repetition_penalty: float = 1.0


def effective_settings(options: GenerationConfig, checkpoint: Mapping[str, Any]) -> SamplingSettings:
    """What holds for this run; a value that neither side names has no effect."""

    def value(name: str, neutral: float) -> Any:
        chosen = getattr(options, name, None)
        chosen = checkpoint.get(name) if chosen is None else chosen
        return neutral if chosen is None else chosen

    penalty = float(value("repetition_penalty", 1.0))
    if not isinstance(options, SampleConfig):
        return SamplingSettings(do_sample=False, repetition_penalty=penalty)
    return SamplingSettings(
        do_sample=True,
        temperature=float(value("temperature", 1.0)),
        top_p=float(value("top_p", 1.0)),
        top_k=int(value("top_k", 0)),
        repetition_penalty=penalty,
    )


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
        cumulative_BV = probability_BV.cumsum(-1)
        target_B1 = torch.from_numpy(uniform_B).to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
        place_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
        last_B1 = ((probability_BV > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # a row of NaN has no probability
        return order_BV.gather(-1, torch.minimum(place_B1, last_B1))[:, 0]

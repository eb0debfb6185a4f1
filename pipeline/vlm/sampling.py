"""How the next token is chosen: one sampler for every engine.

Greedy takes the likeliest token. Sampling adds a number to each token's logit, made from (seed, id, prompt_name,
sample_index, step, token), and takes the largest sum (Gumbel-max, Gumbel 1954): tokens come by their probabilities, and
an answer depends neither on its batch nor on its slot. One uniform number and the inverse of the distribution would do,
too, but the rounding of another batch moves all its boundaries: with noise of 3e-7 of the largest logit it changed one
token in a hundred of a random distribution over 150,000, where this changed none of 400.

Filters come in transformers' order: repetition penalty, temperature, top_k, top_p, then its min_p, typical_p,
epsilon_cutoff and eta_cutoff.

Shapes: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
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


def step_seed(seed: int, step: int) -> int:
    """A row's seed for one step: splitmix64 (Steele, Lea, Flood 2014) over a counter."""
    z = (seed + (step + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def uniform_noise(seeds: Sequence[int], token_BV: torch.Tensor) -> torch.Tensor:
    """A number in (0, 1) for each row and token, float64 [B, V]: splitmix64 over the tokens, from the row's seed."""
    seed_B1 = torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64, device=token_BV.device)[:, None]
    z_BV = seed_B1 + (token_BV + 1) * _signed(_GOLDEN)  # int64 wraps around, as the method wants
    z_BV = (z_BV ^ _shifted(z_BV, 30)) * _signed(_MIX_1)
    z_BV = (z_BV ^ _shifted(z_BV, 27)) * _signed(_MIX_2)
    z_BV = z_BV ^ _shifted(z_BV, 31)
    return (_shifted(z_BV, 11).double() + 0.5) / float(1 << 53)


def _shifted(z: torch.Tensor, num_bits: int) -> torch.Tensor:
    """A logical shift to the right; torch's keeps the sign."""
    return (z >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


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
        allowed_BV: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of each row, and whether the row's logits were finite.

        steps: tokens that each row has already; seen_BV: tokens of its prompt and answer, padding left out;
        allowed_BV: tokens that may come; filters see no others.

        Returns:
            token_B int64, finite_B bool.
        """
        largest_B, token_B = logits_BV.max(-1)  # NaN and +inf win a maximum, so it tells for the whole row
        finite_B = torch.isfinite(largest_B)
        if allowed_BV is not None:
            logits_BV = logits_BV.masked_fill(~allowed_BV, -torch.inf)
        if not self.settings.do_sample and seen_BV is None:
            return token_B if allowed_BV is None else logits_BV.argmax(-1), finite_B
        logits_BV = logits_BV.float()
        if seen_BV is not None:
            penalty = self.settings.repetition_penalty
            penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
            logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
        if not self.settings.do_sample:
            return logits_BV.argmax(-1), finite_B
        seeds = [step_seed(row_seed(self._seed, sample), step) for sample, step in zip(samples, steps, strict=True)]
        return self._draw(logits_BV, seeds), finite_B

    def _draw(self, logits_BV: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        settings = self.settings
        if settings.temperature <= 0:
            return logits_BV.argmax(-1)
        logits_BV = logits_BV / settings.temperature
        token_BV = torch.arange(logits_BV.shape[1], device=logits_BV.device).expand_as(logits_BV)
        if settings.top_k or settings.top_p < 1 or self._warpers:
            # Stable: equal logits keep the order of their token ids, whatever the batch.
            logits_BV, token_BV = torch.sort(logits_BV, dim=-1, descending=True, stable=True)
            logits_BV = self._filtered(logits_BV)
        gumbel_BV = -(-uniform_noise(seeds, token_BV).log()).log()
        place_B1 = (logits_BV.double() + gumbel_BV).argmax(-1, keepdim=True)
        return token_BV.gather(-1, place_B1)[:, 0]

    def _filtered(self, sorted_BV: torch.Tensor) -> torch.Tensor:
        """Logits, largest first, with minus infinity for what is not to be drawn."""
        settings = self.settings
        if settings.top_k:
            sorted_BV[:, settings.top_k :] = -torch.inf
        probability_BV = torch.softmax(sorted_BV.double(), -1)
        below_BV = probability_BV.cumsum(-1) - probability_BV  # mass of the likelier tokens
        out_BV = (below_BV >= settings.top_p) | (probability_BV == 0)
        sorted_BV = sorted_BV.nan_to_num().masked_fill(out_BV, -torch.inf)
        for warper in self._warpers:  # blind to the order of the tokens
            sorted_BV = warper(None, sorted_BV)
        return sorted_BV

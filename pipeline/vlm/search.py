"""Generation by transformers' own loop: encoder-decoders, whose decoder takes other inputs than ours gives, and beams.

Shapes: B rows in the batch, K beams of each, T tokens so far, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.errors import Interrupted
from pipeline.vlm.answer import Ending, Generation
from pipeline.vlm.base import StopSignal
from pipeline.vlm.decode import Choose, seen_tokens


class OwnLoop:
    """Our choice of tokens inside transformers' loop: a logits processor that leaves it one token for each row."""

    def __init__(self, generations: Sequence[Generation], choose: Choose, *, needs_history: bool) -> None:
        self._generations, self._choose, self._needs_history = generations, choose, needs_history
        self._seen_BV: torch.Tensor | None = None
        self._prompt: tuple[torch.Tensor, torch.Tensor | None] | None = None  # tokens and mask; none for a decoder

    def run(self, model: Any, batch: dict[str, Any], settings: Any) -> None:
        """Generate until every row has ended."""
        if not model.config.is_encoder_decoder:
            self._prompt = (batch["input_ids"], batch.get("attention_mask"))
        model.generate(**batch, generation_config=settings, logits_processor=[self], stopping_criteria=[self.ended])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._seen_BV is None and self._needs_history:
            nothing_BV = torch.zeros_like(scores, dtype=torch.bool)  # a decoder has its own tokens alone
            self._seen_BV = seen_tokens(*self._prompt, scores) if self._prompt else nothing_BV
        token_B = self._choose(self._generations, scores, self._seen_BV)
        return torch.full_like(scores, -torch.inf).scatter(1, token_B[:, None], 0.0)

    def ended(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Which rows need no further token."""
        return torch.tensor([row.done for row in self._generations], device=input_ids.device)


class BeamSearch:
    """transformers' beam search over rows of one cap; the best beam of each becomes its generation."""

    def __init__(
        self, generations: Sequence[Generation], ending: Ending, stop: StopSignal, *, repetition_penalty: float
    ) -> None:
        self._generations, self._ending, self._stop = generations, ending, stop
        self._penalty = repetition_penalty
        self._num_prompt_tokens: int | None = None  # of what generate() returns
        self._prompt_mask_BT: torch.Tensor | None = None
        self._finite_B = torch.ones(len(generations), dtype=torch.bool)

    def run(self, model: Any, batch: dict[str, Any], settings: Any) -> None:
        """Generate all rows."""
        if not model.config.is_encoder_decoder:
            self._prompt_mask_BT = batch["attention_mask"].bool()
        found_BT = model.generate(
            **batch, generation_config=settings, logits_processor=[self], stopping_criteria=[self.ended]
        )
        for row, tokens_T, finite in zip(self._generations, found_BT.tolist(), self._finite_B.tolist(), strict=True):
            for token in tokens_T[self._num_prompt_tokens :]:
                if not row.done:
                    self._ending.add(row, token, finite=finite)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._num_prompt_tokens is None:
            self._num_prompt_tokens = input_ids.shape[1]
        if self._stop.expired:
            raise Interrupted("the grace period ended while a batch was being answered")
        finite_B = torch.isfinite(scores.amax(-1)).view(len(self._generations), -1).any(-1)
        self._finite_B &= finite_B.cpu()
        if self._penalty == 1.0:
            return scores
        seen_BV = self._seen(input_ids, scores)
        penalised_BV = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
        return torch.where(seen_BV, penalised_BV, scores)

    def ended(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Nothing but end tokens and the cap ends a beam: its hypotheses compete as long as they may."""
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _seen(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Which tokens a beam has had; padding, which differs from batch to batch, does not count."""
        counts_BV = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
        present_BT = torch.ones_like(input_ids, dtype=torch.int32)
        if self._prompt_mask_BT is not None and self._num_prompt_tokens == self._prompt_mask_BT.shape[1]:
            num_beams = len(input_ids) // len(self._generations)
            prompt_BT = self._prompt_mask_BT.repeat_interleave(num_beams, dim=0)
            present_BT[:, : prompt_BT.shape[1]] = prompt_BT.to(torch.int32)
        counts_BV.scatter_add_(1, input_ids.clamp(max=scores.shape[1] - 1), present_BT)
        return counts_BV > 0

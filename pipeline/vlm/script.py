"""A choice of tokens that was made before: two ways of computing the same answer are compared at each of its steps.

Shapes: B rows in the batch, V tokens of the vocabulary, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.records import FinishReason
from pipeline.vlm.answer import Generation


class Script:
    """Gives every row the same tokens, so that two ways of computing them can be compared at each step; no end."""

    def __init__(self, tokens: list[int] | None, eos_ids: Sequence[int]) -> None:
        self._eos_ids = list(eos_ids)
        self.tokens = list(tokens or [])
        self.logits_SV: list[torch.Tensor] = []

    def choose(self, rows: Sequence[Generation], logits_BV: torch.Tensor, seen_BV: torch.Tensor | None) -> torch.Tensor:
        step = len(self.logits_SV)
        self.logits_SV.append(logits_BV[0].float().nan_to_num())  # what a processor forbids is minus infinity
        if step == len(self.tokens):
            allowed_V = self.logits_SV[-1].clone()
            allowed_V[[number for number in self._eos_ids if number < len(allowed_V)]] = -torch.inf
            self.tokens.append(int(allowed_V.argmax()))
        for row in rows:
            if not row.done:
                row.tokens.append(self.tokens[step])
                row.finish_reason = FinishReason.LENGTH if len(row.tokens) == row.max_new_tokens else None
        return torch.full((len(rows),), self.tokens[step], device=logits_BV.device)

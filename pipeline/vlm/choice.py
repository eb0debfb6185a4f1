"""The next token of each row of a batch: drawn on the device, noted on the host, which ends rows by the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from pipeline.errors import Interrupted
from pipeline.vlm.answer import Ending, Generation
from pipeline.vlm.base import OnToken, StopSignal
from pipeline.vlm.sampling import Sampler

if TYPE_CHECKING:
    from pipeline.vlm.grammar import Grammar


class TokenChoice:
    """Held by an engine. `on_token` is told each token of a row that is still at work.

    grammar: of answers that are constrained.
    """

    def __init__(self, sampler: Sampler, ending: Ending, stop: StopSignal, grammar: Grammar | None = None) -> None:
        self._sampler, self._ending, self._stop, self._grammar = sampler, ending, stop, grammar
        self.on_token: OnToken | None = None

    @property
    def needs_history(self) -> bool:
        """Whether the tokens that a row has had matter."""
        return self._sampler.needs_history

    @property
    def numerics(self) -> Mapping[str, str]:
        """What beside the model may differ between two runs."""
        return {} if self._grammar is None else self._grammar.numerics

    @property
    def needs_tokens(self) -> bool:
        """Whether a row's last token has to be known before its next one can be drawn."""
        return self._grammar is not None

    def __call__(
        self, generations: Sequence[Generation], logits_BV: torch.Tensor, seen_BV: torch.Tensor | None
    ) -> torch.Tensor:
        """Give each generation its next token, noted in `seen_BV`; the tokens [B].

        Raises:
            Interrupted: the grace period ended.
        """
        steps = [len(row.tokens) for row in generations]
        token_B, finite_B = self.draw(generations, steps, logits_BV, seen_BV)
        self.note(generations, token_B.tolist(), finite_B.tolist(), logits_BV)
        return token_B

    def draw(
        self,
        generations: Sequence[Generation],
        steps: Sequence[int],
        logits_BV: torch.Tensor,
        seen_BV: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B], and whether a row's logits were finite [B]; nothing waits for the device.

        steps: tokens that each row has been given before.
        """
        samples = [row.sample for row in generations]
        allowed_BV = None if self._grammar is None else self._grammar.allowed(generations, logits_BV)
        token_B, finite_B = self._sampler.choose(logits_BV, samples, steps, seen_BV, allowed_BV)
        if seen_BV is not None:
            seen_BV.scatter_(1, token_B[:, None], True)
        return token_B, finite_B

    def note(
        self,
        generations: Sequence[Generation],
        tokens: Sequence[int],
        finite: Sequence[bool],
        logits_BV: torch.Tensor | None,
    ) -> None:
        """Hand tokens to their rows. A finished row may stay in the batch for some steps, and gets nothing more.

        Raises:
            Interrupted: the grace period ended.
        """
        for place, (row, token, is_finite) in enumerate(zip(generations, tokens, finite, strict=True)):
            if row.done:
                continue
            if row.logits_SV is not None and logits_BV is not None:
                row.logits_SV.append(logits_BV[place].to("cpu", torch.float32, copy=True))
            self._ending.add(row, token, finite=is_finite)
            if self._grammar is not None:
                self._grammar.advance(row)
            if self.on_token is not None and is_finite:
                self.on_token(row.sample, token)
        if self._stop.expired and not all(row.done for row in generations):
            raise Interrupted("the grace period ended while a batch was being answered")

"""Whether a model's slots give the logits of its own generate(), tried on the run's first rows before they are used.

Two or three rows are generated alone by transformers' own loop, then in slots with the same tokens, one of them
entering while the others are in the middle of their answers, and the first one twice. What differs by more than
rounding is not used: first the reuse of encoded images is given up, then the slots.

Shapes: B rows, V tokens of the vocabulary, S steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.records import FinishReason
from pipeline.vlm.answer import Generation
from pipeline.vlm.base import Batcher
from pipeline.vlm.inputs import ModelInputs
from pipeline.vlm.script import Script
from pipeline.vlm.search import OwnLoop
from pipeline.vlm.slots.loop import SlotLoop
from pipeline.vlm.slots.queue import Waiting

# Of the largest logit. Float32 rounding came to 2e-6 over the architectures of docs/models.md, bfloat16's to 2e-2.
BOUND_FLOAT32, BOUND_HALF = 1e-5, 5e-2
_NUM_STEPS = 5


class Trial:
    """The truth about some rows, to be compared with any way of computing them."""

    def __init__(
        self, model: Any, batcher: Batcher, inputs: ModelInputs, settings: Any, waiting: Sequence[Waiting]
    ) -> None:
        self.bound = BOUND_FLOAT32 if model.dtype == torch.float32 else BOUND_HALF
        by_length = sorted(waiting, key=lambda one: one.sample.num_tokens)
        places = {0: None, len(by_length) - 1: None, len(by_length) // 2: None}
        self.waiting = [by_length[place] for place in places]
        settings = copy.copy(settings)
        settings.max_new_tokens = _NUM_STEPS
        self._truth: list[Script] = []
        for one in self.waiting:
            script = Script(None, settings.eos_token_id or [])
            with torch.inference_mode():
                loop = OwnLoop([Generation(one.sample, _NUM_STEPS)], script.choose, needs_history=False)
                loop.run(model, inputs(batcher.collate([one.sample])), settings)
            self._truth.append(script)

    def error(self, build: Callable[[Any], SlotLoop]) -> float:
        """The largest difference, of the largest logit.

        build: makes a loop that chooses its tokens by what it is given.

        Raises:
            whatever the model raises.
        """
        told = _Told()
        loop = build(told)
        turns = [*range(len(self.waiting)), 0]
        waiting = [self.waiting[turn] for turn in turns]
        generations = [Generation(one.sample, _NUM_STEPS) for one in waiting]
        for generation, turn in zip(generations, turns, strict=True):
            told.tokens[id(generation)] = self._truth[turn].tokens
        half = max(1, len(waiting) // 2)
        loop.begin(waiting[:half], generations[:half])
        loop.seat(half)
        loop.step()
        loop.step()
        loop.begin(waiting[half:], generations[half:])
        loop.seat(len(waiting))
        while loop.num_live:
            loop.step()
            loop.finished()
        worst = 0.0
        for generation, turn in zip(generations, turns, strict=True):
            truth_SV = self._truth[turn].logits_SV
            for truth_V, found_V in zip(truth_SV, told.logits_SV[id(generation)], strict=True):
                worst = max(worst, float((truth_V - found_V).abs().max() / truth_V.abs().max()))
        return worst


class _Told:
    """Gives each row the tokens of the truth, and keeps the logits that it was shown."""

    needs_history = False

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.logits_SV: dict[int, list[torch.Tensor]] = {}

    def __call__(self, rows: Sequence[Generation], logits_BV: torch.Tensor, seen_BV: Any) -> torch.Tensor:
        told = []
        for row, logits_V in zip(rows, logits_BV, strict=True):
            step = len(row.tokens)
            told.append(self.tokens[id(row)][min(step, _NUM_STEPS - 1)])
            if not row.done:
                self.logits_SV.setdefault(id(row), []).append(logits_V.to("cpu", torch.float32).nan_to_num())
                row.tokens.append(told[-1])
                row.finish_reason = FinishReason.LENGTH if len(row.tokens) == _NUM_STEPS else None
        return torch.tensor(told, device=logits_BV.device)

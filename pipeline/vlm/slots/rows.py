"""What the loop knows of its rows: of those whose prompt is computed and who wait for a slot, and of those in slots.

Shapes: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.vlm.answer import Generation
from pipeline.vlm.slots.memory import Slot
from pipeline.vlm.slots.prefill import Prefilled


@dataclass(slots=True, eq=False)
class BegunRow:
    """A row that has its first token and no slot; its keys and values are still those of the batch it began in."""

    generation: Generation
    batch: Prefilled
    place: int  # in that batch
    token_1: torch.Tensor


@dataclass(slots=True)
class LiveRows:
    """What the next decode step is given; all in one order, that of pools and their slots."""

    generations: list[Generation]
    slots: list[Slot]
    token_B: torch.Tensor
    position: torch.Tensor  # [..., B, 1]
    length_B: torch.Tensor  # tokens that the slot holds
    seen_BV: torch.Tensor | None

    @classmethod
    def of(cls, begun: Sequence[BegunRow], slots: Sequence[Slot]) -> LiveRows:
        """Rows whose keys and values are in these slots by now."""
        token_B = torch.cat([row.token_1 for row in begun])
        seen = [row.batch.seen_BV[row.place] for row in begun if row.batch.seen_BV is not None]
        return cls(
            [row.generation for row in begun],
            list(slots),
            token_B,
            torch.stack([row.batch.position[..., row.place, :] for row in begun], dim=-2) + 1,
            torch.tensor([slot.num_tokens for slot in slots], device=token_B.device),
            torch.stack(seen) if seen else None,
        )

    def selected(self, places: Sequence[int]) -> LiveRows:
        """Some of them, in that order."""
        index = torch.tensor(places, device=self.token_B.device)
        return LiveRows(
            [self.generations[place] for place in places],
            [self.slots[place] for place in places],
            self.token_B[index],
            self.position[..., index, :],
            self.length_B[index],
            None if self.seen_BV is None else self.seen_BV[index],
        )

    def joined(self, other: LiveRows) -> LiveRows:
        """These, and others behind them."""
        return LiveRows(
            self.generations + other.generations,
            self.slots + other.slots,
            torch.cat([self.token_B, other.token_B]),
            torch.cat([self.position, other.position], dim=-2),
            torch.cat([self.length_B, other.length_B]),
            None if self.seen_BV is None or other.seen_BV is None else torch.cat([self.seen_BV, other.seen_BV]),
        )

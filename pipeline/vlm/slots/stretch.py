"""Stretches of a prompt: some of its queries, and the cells that any of them looks at.

Shapes: B rows, T queries, S cells, C of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

HIDDEN = torch.finfo(torch.float32).min  # not infinity: what sees nothing, padding, is a number then
_ALIGNED = 32  # columns: 127 took three times as long as 128


@dataclass(slots=True)
class Stretch:
    """Queries `start` to `stop`, and the cells `first` to `last` that any of them looks at."""

    start: int
    stop: int
    first: int
    last: int
    mask_B1TS: torch.Tensor | None = None  # float32, added to scores; None where all of them look at all
    hides_only: bool = True  # the mask says no more than what is hidden, so that any dtype can hold it
    _parts: dict[torch.dtype, list[tuple[slice, torch.Tensor]]] = field(default_factory=dict)

    def added(self, dtype: torch.dtype) -> list[tuple[slice, torch.Tensor]]:
        """The columns of the mask that are not zero, and what is added there, [B, 1, T, C] each.

        Of causal queries that is the end of what they look at, and of padded ones the beginning, too.
        """
        if self.mask_B1TS is None:
            return []
        if dtype not in self._parts:
            # Half of the least number, as a score is added to it.
            mask_B1TS = self.mask_B1TS.clamp_min(torch.finfo(dtype).min / 2)
            self._parts[dtype] = [
                (columns, mask_B1TS[..., columns].to(dtype).contiguous()) for columns in self._columns(mask_B1TS)
            ]
        return self._parts[dtype]

    @staticmethod
    def _columns(mask_B1TS: torch.Tensor) -> list[slice]:
        found: list[slice] = []
        width = mask_B1TS.shape[-1]
        for column in mask_B1TS.flatten(0, 2).any(0).nonzero().flatten().tolist():
            start = column - column % _ALIGNED
            stop = min(start + _ALIGNED, width)
            if found and start <= found[-1].stop:
                found[-1] = slice(found[-1].start, stop)
            else:
                found.append(slice(start, stop))
        return found


class Stretches:
    """Of the masks of one forward: its layers share them."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[torch.Tensor | None, list[Stretch]]] = {}

    def __call__(
        self, mask_B1TS: torch.Tensor | None, num_tokens: int, *, causal: bool, at_a_time: int
    ) -> list[Stretch]:
        """mask: bool, True where a query looks, or a number to be added; None is causal, or hides nothing."""
        key = id(mask_B1TS), num_tokens, causal, at_a_time
        if key not in self._known:
            if mask_B1TS is None and not causal:
                found = _whole(num_tokens, at_a_time)
            else:
                found = stretches_of(causal_mask(num_tokens) if mask_B1TS is None else mask_B1TS, at_a_time)
            self._known[key] = mask_B1TS, found
        return self._known[key][1]

    def __len__(self) -> int:
        """Masks that are known."""
        return len(self._known)

    def forget(self) -> None:
        self._known.clear()


def stretches_of(mask_B1TS: torch.Tensor, at_a_time: int) -> list[Stretch]:
    """All of a mask, so many queries at a time."""
    added_B1TS = mask_B1TS.float()
    if mask_B1TS.dtype == torch.bool:
        added_B1TS = torch.zeros(mask_B1TS.shape).masked_fill_(~mask_B1TS, HIDDEN)
    found = []
    for start in range(0, mask_B1TS.shape[2], at_a_time):
        part_B1TS = added_B1TS[:, :, start : start + at_a_time]
        stop = start + part_B1TS.shape[2]
        seen = (part_B1TS > HIDDEN / 2).flatten(0, 2).any(0).nonzero()
        # Where nothing is seen all cells stay, as in the whole: it is padding, whose result nobody reads.
        first, last = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, mask_B1TS.shape[3])
        mine_B1TS = part_B1TS[..., first:last].contiguous()
        if not mine_B1TS.any():
            found.append(Stretch(start, stop, first, last))
            continue
        hides_only = bool(((mine_B1TS == 0) | (mine_B1TS <= HIDDEN / 2)).all())
        found.append(Stretch(start, stop, first, last, mine_B1TS, hides_only))
    return found


def causal_mask(num_tokens: int) -> torch.Tensor:
    """Each token looks at those before it, and at itself; bool [1, 1, T, T]."""
    return torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool).tril()


def _whole(num_tokens: int, at_a_time: int) -> list[Stretch]:
    """Where each token looks at all."""
    starts = range(0, num_tokens, at_a_time)
    return [Stretch(start, min(start + at_a_time, num_tokens), 0, num_tokens) for start in starts]

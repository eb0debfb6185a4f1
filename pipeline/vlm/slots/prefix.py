"""Prompts that go on from what they share: computed once, its keys and values are what the rest of each looks back to.

The rests of several prompts lie behind each other in one row, a pack, over one copy of their prefix, and a mask keeps
them apart: nothing is padded and no prefix is copied for each prompt. Attention that takes no such mask (flash
attention) gets one rest in a row.

Shapes: B prompts, F packs, P cells of prefixes, R of rests, H heads of keys and values, D of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from pipeline.vlm.slots.pool import KeysAndValues

# More in one row would compute more of what the mask hides than packing saves.
MAX_PACK_TOKENS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """What a family of prompts begins with: keys and values [H, P, D] of each layer, position [..., 1] of its last."""

    decoder: Any
    layers: KeysAndValues
    position: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.layers[0][0].shape[1])

    @property
    def num_bytes(self) -> int:
        return sum(keys_HPD.nbytes + values_HPD.nbytes for keys_HPD, values_HPD in self.layers)


@dataclass(slots=True)
class _Pack:
    prefix: Prefix
    rows: list[int] = field(default_factory=list)
    num_tokens: int = 0


class Continuation:
    """The inputs of one forward over the rests of some prompts, and where each prompt is found in its results.

    Args:
        prefixes: of each prompt.
        rests: the tokens of each that come after it.
        max_pack_tokens: of rests in one row; 0 leaves each in a row of its own.
        like: a floating tensor on the device, of the dtype of masks.
    """

    def __init__(
        self,
        prefixes: Sequence[Prefix],
        rests: Sequence[np.ndarray],
        *,
        max_pack_tokens: int,
        pad_token_id: int,
        like: torch.Tensor,
    ) -> None:
        packs = _packs(prefixes, rests, max_pack_tokens)
        width, num_rest = max(pack.prefix.num_tokens for pack in packs), max(pack.num_tokens for pack in packs)
        input_ids_FR = torch.full((len(packs), num_rest), pad_token_id)
        step_FR = torch.zeros(len(packs), num_rest, dtype=torch.long)
        seen_FRT = torch.zeros(len(packs), num_rest, width + num_rest, dtype=torch.bool)
        self.pack_B, self.end_B = [0] * len(rests), [0] * len(rests)  # each prompt's row, and its last token there
        self.spans = [(0, 0)] * len(rests)  # of each prompt: the cells of its rest
        for number, pack in enumerate(packs):  # padded in front, both prefix and rests
            start, begin = width - pack.prefix.num_tokens, num_rest - pack.num_tokens
            seen_FRT[number, :, start:width] = True
            for row in pack.rows:
                end = begin + len(rests[row])
                input_ids_FR[number, begin:end] = torch.from_numpy(rests[row])
                step_FR[number, begin:end] = torch.arange(1, end - begin + 1)
                own = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
                seen_FRT[number, begin:end, width + begin : width + end] = own
                self.pack_B[row], self.end_B[row] = number, end - 1
                self.spans[row] = (width + begin, width + end)
                begin = end
        self.num_computed_tokens = input_ids_FR.numel()
        self.ends = sorted(set(self.end_B))
        device = like.device
        self.input_ids_FR = input_ids_FR.to(device)
        self.position = torch.stack([pack.prefix.position for pack in packs], dim=-2) + step_FR.to(device)
        if len(packs) == len(rests):  # as any batch that is padded in front
            self.mask = seen_FRT[:, -1].long().to(device)
        else:
            hidden_F1RT = ~seen_FRT[:, None].to(device)
            self.mask = torch.zeros_like(hidden_F1RT, dtype=like.dtype).masked_fill_(
                hidden_F1RT, torch.finfo(like.dtype).min
            )
        self.cache = DynamicCache()
        for layer in range(len(packs[0].prefix.layers)):
            keys_and_values = [[pack.prefix.layers[layer][which] for pack in packs] for which in (0, 1)]
            self.cache.update(*(_side_by_side(tensors_HPD, width) for tensors_HPD in keys_and_values), layer)

    def at_ends(self, logits_FEV: torch.Tensor) -> torch.Tensor:
        """[B, V] of each prompt's last token, from the logits of `ends` in each pack, or of all R."""
        places = self.end_B if logits_FEV.shape[1] > len(self.ends) else [self.ends.index(end) for end in self.end_B]
        return logits_FEV[self.pack_B, places]

    @property
    def end_position(self) -> torch.Tensor:
        """[..., B, 1] of each prompt's last token."""
        return self.position[..., self.pack_B, self.end_B].unsqueeze(-1)


def _packs(prefixes: Sequence[Prefix], rests: Sequence[np.ndarray], max_tokens: int) -> list[_Pack]:
    """The prompts' rows, in their order where each has its own."""
    packs: list[_Pack] = []
    of_prefix: dict[int, _Pack] = {}
    for row, (prefix, rest) in enumerate(zip(prefixes, rests, strict=True)):
        pack = of_prefix.get(id(prefix))
        if pack is None or pack.num_tokens + len(rest) > max_tokens:
            pack = of_prefix[id(prefix)] = _Pack(prefix)
            packs.append(pack)
        pack.rows.append(row)
        pack.num_tokens += len(rest)
    return packs


def _side_by_side(rows_HPD: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Rows of different length as one batch [F, H, width, D], zeros in front."""
    first = rows_HPD[0]
    if len(rows_HPD) == 1:
        return first[None]
    found = first.new_zeros(len(rows_HPD), first.shape[0], width, first.shape[2])
    for row, keys_HPD in enumerate(rows_HPD):
        found[row, :, width - keys_HPD.shape[1] :] = keys_HPD
    return found

"""Attention of decode steps by matrix products: queries with keys, a softmax in float32, its shares with values.

The heads of queries that share keys and values are the rows of one product, over whole blocks (pool.py).

Shapes: N slots, H heads of keys and values, T queries of each (heads that share them, or rows that share a prefix), S
cells of a block, L cells that are looked at, D of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.vlm.slots.share import PrefixShare, Share

# The result of attention [..., D], and the logarithm of the sum of exponentials that it was divided by [...].
Part = tuple[torch.Tensor, torch.Tensor]


def matmul(
    query_NHGD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    share: Share,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Over the cells of each slot. keys, values: as they lie in the pool."""
    scores_NHGL = _scores(query_NHGD * scale, keys, share)
    if softcap is not None:
        scores_NHGL = softcap * torch.tanh(scores_NHGL / softcap)
    scores_NHGL.masked_fill_(share.mask(window), -torch.inf)
    return _mixed(torch.softmax(scores_NHGL, -1, dtype=torch.float32), values, share)


def matmul_part(
    query_NHTD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, share: Share | PrefixShare, scale: float
) -> Part:
    """The same over a part of what the queries look at, and the sums."""
    scores_NHTL = _scores(query_NHTD * scale, keys, share)
    hidden_N11L = share.mask()
    if hidden_N11L is not None:
        scores_NHTL.masked_fill_(hidden_N11L, -torch.inf)
    shares_NHTL = torch.softmax(scores_NHTL, -1, dtype=torch.float32)
    # The largest share is exp(largest score) over the sum: no exponentials but those of the softmax.
    sum_NHT = scores_NHTL.amax(-1).float() - shares_NHTL.amax(-1).log()
    return _mixed(shares_NHTL, values, share), sum_NHT


def _scores(query_NHTD: torch.Tensor, keys: torch.Tensor, share: Share | PrefixShare) -> torch.Tensor:
    """[N, H, T, L] in the dtype of the query."""
    found = [torch.matmul(query_NHTD, block_NHDS) for block_NHDS in share.pool.key_blocks(keys, share.num_cells)]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _mixed(shares_NHTL: torch.Tensor, values: torch.Tensor, share: Share | PrefixShare) -> torch.Tensor:
    """[N, H, T, D] in the dtype of the values. The shares are float32, and blocks are added up so."""
    shares_NHTL = shares_NHTL.to(values.dtype)
    blocks: Sequence[torch.Tensor] = share.pool.value_blocks(values, share.num_cells)
    if len(blocks) == 1:
        return torch.matmul(shares_NHTL, blocks[0])
    parts = torch.split(shares_NHTL, [block_NHSD.shape[2] for block_NHSD in blocks], -1)
    mixed_NHTD = torch.matmul(parts[0], blocks[0]).float()
    for part_NHTS, block_NHSD in zip(parts[1:], blocks[1:], strict=True):
        mixed_NHTD += torch.matmul(part_NHTS, block_NHSD)
    return mixed_NHTD.to(values.dtype)

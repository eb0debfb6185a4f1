"""Attention of decode steps by products: queries with keys, a softmax in float32, its shares with values.

Two ways to compute the products over a pool in blocks (pool.py):

`Matmul` are matrix products; the heads that share keys and values are the rows of one.

`Bags` are weighted sums of vectors, which read nothing but what a row has filled (sums.py): a mixed value is the sum of
the values of a row's cells by their shares; and the scores of a block of cells are the sum of the components of its
keys, vectors over the cells, by those of the query. Reading 16 rows of 12 heads of 64 from memory took 0.46 (keys) and
0.50 ms (values) by matrix products and 0.15 and 0.19 so, on two cores of an EPYC; 16 rows of 2 heads of 128, each for 8
of queries, 0.56 and 0.92, and 0.49 and 0.44.

Shapes: N slots, H heads of keys and values, T queries of each (heads that share them, or rows that share a prefix), K
blocks of S cells, L cells that are looked at, D of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pipeline.vlm.slots.share import PrefixShare, Share

# The result of attention [..., D], and the logarithm of the sum of exponentials that it was divided by [...].
Part = tuple[torch.Tensor, torch.Tensor]


class Products(Protocol):
    """A way to compute them. keys and values: as they lie in a pool (Pool.keys, Pool.values)."""

    def scores(self, query_NHTD: torch.Tensor, keys: torch.Tensor, share: Share | PrefixShare) -> torch.Tensor:
        """[N, H, T, L] in the dtype of the query, L as in the share's mask."""
        ...

    def mixed(self, shares_NHTL: torch.Tensor, values: torch.Tensor, share: Share | PrefixShare) -> torch.Tensor:
        """[N, H, T, D] in the dtype of the values. The shares are float32."""
        ...


def attend(
    query_NHGD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    share: Share,
    window: int | None,
    scale: float,
    softcap: float | None,
    *,
    products: Products,
) -> torch.Tensor:
    """Over the cells of each row."""
    scores_NHGL = products.scores(query_NHGD * scale, keys, share)
    if softcap is not None:
        scores_NHGL = softcap * torch.tanh(scores_NHGL / softcap)
    scores_NHGL.masked_fill_(share.mask(window), -torch.inf)
    return products.mixed(torch.softmax(scores_NHGL, -1, dtype=torch.float32), values, share)


def attend_to_part(
    query_NHTD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    share: Share | PrefixShare,
    scale: float,
    *,
    products: Products,
) -> Part:
    """The same, and the sums."""
    scores_NHTL = products.scores(query_NHTD * scale, keys, share)
    hidden_N11L = share.mask()
    if hidden_N11L is not None:
        scores_NHTL.masked_fill_(hidden_N11L, -torch.inf)
    shares_NHTL = torch.softmax(scores_NHTL, -1, dtype=torch.float32)
    # The largest share is exp(largest score) over the sum: no exponentials but those of the softmax.
    sum_NHT = scores_NHTL.amax(-1).float() - shares_NHTL.amax(-1).log()
    return products.mixed(shares_NHTL, values, share), sum_NHT


class Matmul:
    """Over whole blocks, those of the longest row."""

    def scores(self, query_NHTD: torch.Tensor, keys: torch.Tensor, share: Share | PrefixShare) -> torch.Tensor:
        """See Products."""
        found = [torch.matmul(query_NHTD, block_NHDS) for block_NHDS in share.pool.key_blocks(keys, share.num_cells)]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def mixed(self, shares_NHTL: torch.Tensor, values: torch.Tensor, share: Share | PrefixShare) -> torch.Tensor:
        """See Products. Blocks are added up in float32."""
        shares_NHTL = shares_NHTL.to(values.dtype)
        blocks: Sequence[torch.Tensor] = share.pool.value_blocks(values, share.num_cells)
        if len(blocks) == 1:
            return torch.matmul(shares_NHTL, blocks[0])
        parts = torch.split(shares_NHTL, [block_NHSD.shape[2] for block_NHSD in blocks], -1)
        mixed_NHTD = torch.matmul(parts[0], blocks[0]).float()
        for part_NHTS, block_NHSD in zip(parts[1:], blocks[1:], strict=True):
            mixed_NHTD += torch.matmul(part_NHTS, block_NHSD)
        return mixed_NHTD.to(values.dtype)


class Bags:
    """Over the blocks and cells that each row has filled; of several rows that share a prefix by matrix products."""

    _shared = Matmul()

    def scores(self, query_NHTD: torch.Tensor, keys: torch.Tensor, share: Share | PrefixShare) -> torch.Tensor:
        """See Products."""
        if isinstance(share, PrefixShare):
            return self._shared.scores(query_NHTD, keys, share)
        num_blocks = share.pool.num_read_cells(share.num_cells) // share.pool.num_block_cells
        weights = query_NHTD.unsqueeze(3).expand(-1, -1, -1, num_blocks, -1)
        return share.key_sums(keys, query_NHTD.shape[2])(keys, weights.flatten()).view(*query_NHTD.shape[:3], -1)

    def mixed(self, shares_NHTL: torch.Tensor, values: torch.Tensor, share: Share | PrefixShare) -> torch.Tensor:
        """See Products."""
        if isinstance(share, PrefixShare):
            return self._shared.mixed(shares_NHTL, values, share)
        weights = shares_NHTL[..., : share.num_cells].to(values.dtype)
        return share.value_sums(values, shares_NHTL.shape[2])(values, weights.flatten()).view(
            *shares_NHTL.shape[:3], -1
        )

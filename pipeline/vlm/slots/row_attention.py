"""Attention of decode steps row by row, by weighted sums of vectors (sums.py) over pools in blocks (pool.py).

A mixed value is the sum of the values of a row's cells by their shares; the scores of a block of cells are the sum of
the components of its keys, vectors over the cells, by those of the query. Nothing is read but what a row has filled.
Reading 16 rows of 12 heads of 64 from memory took 0.46 (keys) and 0.50 ms (values) by matrix products and 0.15 and 0.19
so, on two cores of an EPYC; 16 rows of 2 heads of 128, each for 8 of queries, 0.56 and 0.92, and 0.49 and 0.44.

What rows share at their beginning is read anew for each of them, but from a cache. One softmax is over both.

Shapes: B rows, H heads of keys and values, G of queries that share one, L cells that are looked at, D of a head.
"""

from __future__ import annotations

import torch

from pipeline.vlm.slots.step import Step, Stored


def attend(
    query_BHGD: torch.Tensor, step: Step, stored: Stored, window: int | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """Over the cells of each row, its prefix among them; [B, H, G, D]."""
    cells = step.row_cells()
    both = [(part, *stored(part.share)) for part in (*cells.own, *cells.prefixes)]
    query_BHGD = query_BHGD * scale
    if len(both) == 1:
        [(part, keys, _)] = both
        scores_BHGL = part.scores(query_BHGD, keys)
    else:
        scores_BHGL = query_BHGD.new_empty(*query_BHGD.shape[:3], cells.num_cells)
        for part, keys, _ in both:
            scores_BHGL[part.rows, ..., part.cells] = part.scores(query_BHGD[part.rows], keys)
    if softcap is not None:
        scores_BHGL = softcap * torch.tanh(scores_BHGL / softcap)
    scores_BHGL.masked_fill_(cells.mask(window), -torch.inf)  # whatever they are: what nobody wrote may be anything
    shares_BHGL = torch.softmax(scores_BHGL, -1)  # computes in float32, and rounds once
    mixed = [part.mixed(shares_BHGL[part.rows, ..., part.cells], values) for part, _, values in both]
    own, prefixes = mixed[: len(cells.own)], mixed[len(cells.own) :]
    out_BHGD = own[0] if len(own) == 1 else torch.cat(own)
    for part, prefix_PHGD in zip(cells.prefixes, prefixes, strict=True):
        out_BHGD[part.rows] += prefix_PHGD
    return out_BHGD

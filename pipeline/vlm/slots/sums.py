"""Weighted sums of vectors that lie in a storage, by torch's embedding_bag.

On x86 that is a kernel of FBGEMM's which fetches the vectors ahead, and reads nothing but them. On two cores of an EPYC
it read keys and values from memory with 40 to 60 GB/s, where products of one row with a matrix came to 20.

Shapes: N slots, H heads of keys and values, T queries of each, C vectors of a sum, D numbers of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Sums:
    """Which vectors are added up, by their numbers in the storage; int32, as 2^31 vectors of 64 numbers are 256 GiB.

    vector_V: of one sum behind the other.
    start: where in them each sum begins, and the end.
    """

    vector_V: torch.Tensor
    start: torch.Tensor

    @classmethod
    def of(cls, vectors: torch.Tensor, num_queries: int) -> Sums:
        """vectors: [N, H, ..., C]. Each of the queries of a slot and head has the same: [N, H, T, ...] sums of C."""
        for_each = vectors.unsqueeze(2).expand(*vectors.shape[:2], num_queries, *vectors.shape[2:])
        start = torch.arange(0, for_each.numel() + 1, vectors.shape[-1], dtype=torch.int32, device=vectors.device)
        return cls(for_each.flatten(), start)

    def __call__(self, storage: torch.Tensor, weight_V: torch.Tensor) -> torch.Tensor:
        """[number of sums, D] in the dtype of both. storage: whose last axis are the vectors."""
        found: torch.Tensor = torch.embedding_bag(
            table(storage),
            self.vector_V,
            self.start,
            False,  # of gradients
            0,  # sums
            False,  # of gradients
            weight_V,
            True,  # the end is among the starts
        )[0]
        return found


def table(storage: torch.Tensor) -> torch.Tensor:
    """All vectors of the memory that a tensor is part of, one after another, whichever way they lie: [V, D]."""
    width = storage.shape[-1]
    num_vectors = storage.untyped_storage().nbytes() // storage.element_size() // width
    return storage.as_strided((num_vectors, width), (width, 1), 0)

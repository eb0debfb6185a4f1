"""Decode steps of fixed shape, recorded once and replayed: on a GPU a step's thousand launches become one.

A recorded step takes every slot of a pool up to a quarter, half, three quarters or all of them, live or not, and all of
their cells: what is not live is masked, or computed and thrown away. Its inputs stand in buffers that stay where they
are. Recording one step for each number of rows is vLLM's way, too (CUDA graphs by batch size).

Shapes: B live rows, N slots of a recorded step, V tokens of the vocabulary.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipeline.vlm.failure import described, raise_fatal, release_memory
from pipeline.vlm.slots.memory import SlotMemory
from pipeline.vlm.slots.share import Share
from pipeline.vlm.slots.step import Step

log = logging.getLogger(__name__)

_MAX_GRAPHS = 48
_WARMING_RUNS = 2  # libraries choose their kernels and take their memory before a step is recorded

Forward = Callable[[], torch.Tensor]
# Makes of a step one that is replayed; both give the step's logits [N, V], in the same place each time.
Record = Callable[[Forward], Forward]


def recorder(device: torch.device) -> Record | None:
    """What records steps on a device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None


class Decode(Protocol):
    """A model's forward for one token of each row (loop.Decoder)."""

    def __call__(self, token_B: torch.Tensor, position: torch.Tensor, cache: Any, /) -> torch.Tensor: ...


class CudaRecorder:
    """Records CUDA graphs, which share their memory: a step's logits hold until the next one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, forward: Forward) -> Forward:
        """Record.

        Raises:
            RuntimeError: the step waits for the host, or does something else that cannot be replayed.
        """
        side: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARMING_RUNS):
                forward()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_NV = forward()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits_NV

        return replay


@dataclass(slots=True)
class _Recorded:
    """A step and its inputs."""

    replay: Forward
    token_N: torch.Tensor
    position: torch.Tensor  # [..., N, 1]
    length_N: torch.Tensor


class RecordedDecoder:
    """Stands in the place of a decoder.

    Args:
        record: gives what records steps; None as long as none is to be recorded.
        give_up: called where a step cannot be recorded; `record` gives None from then on.
        patience: steps of a shape that pass before it is recorded.
    """

    def __init__(
        self,
        decode: Decode,
        memory: SlotMemory,
        record: Callable[[], Record | None],
        give_up: Callable[[], None],
        *,
        patience: int,
    ) -> None:
        self._decode, self._memory, self._record, self._give_up = decode, memory, record, give_up
        self._patience = patience
        self._steps: OrderedDict[tuple[tuple[int, int], ...], _Recorded] = OrderedDict()
        self._num_met: Counter[tuple[tuple[int, int], ...]] = Counter()
        self._places: tuple[Sequence[Share], Sequence[int], torch.Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, token_B: torch.Tensor, position: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits [B, V]. position: [..., B, 1]."""
        if self._record() is None:
            return self._decode(token_B, position, cache)
        shares = self._memory.step.shares
        sizes = [_size(share.num_slots, share.pool.num_slots) for share in shares]
        key = tuple((share.pool.generation, size) for share, size in zip(shares, sizes, strict=True))
        if key not in self._steps:
            self._num_met[key] += 1
            is_due = self._num_met[key] > self._patience
            if not (is_due and self._recorded(key, token_B, position, cache)):
                return self._decode(token_B, position, cache)
        step = self._steps[key]
        self._steps.move_to_end(key)
        self._fill(step, token_B, position, self._place_B(shares, sizes))
        return step.replay()[self._place_B(shares, sizes)]

    def _recorded(
        self, key: tuple[tuple[int, int], ...], token_B: torch.Tensor, position: torch.Tensor, cache: Any
    ) -> bool:
        """Record the step of this key; whether that worked."""
        self._forget()
        shares, num_slots = [], 0
        device = position.device
        length_N = torch.zeros(sum(size for _, size in key), dtype=torch.long, device=device)
        for share, (_, size) in zip(self._memory.step.shares, key, strict=True):
            start, num_slots = num_slots, num_slots + size
            index_P = torch.arange(size, device=device)
            dense = Share(share.pool, start, num_slots, index_P, size, length_N[start:num_slots])
            dense.num_cells = share.pool.num_cells
            shares.append(dense)
        token_N = torch.zeros(num_slots, dtype=torch.long, device=device)
        position_N = position.new_zeros(*position.shape[:-2], num_slots, 1)
        memory, decode = self._memory, self._decode

        def forward() -> torch.Tensor:
            before, memory.step = memory.step, Step(shares)
            memory.step.look_at([share.num_cells for share in shares])
            try:
                return decode(token_N, position_N, cache)
            finally:
                memory.step = before

        step = _Recorded(forward, token_N, position_N, length_N)
        # With these inputs the runs before recording write what the first replay writes, into the same cells.
        self._fill(step, token_B, position, self._place_B(memory.step.shares, [size for _, size in key]))
        try:
            record = self._record()
            assert record is not None
            step.replay = record(forward)
        except Exception as problem:  # a model that asks the device something, or has no memory left for it
            raise_fatal(problem)
            log.info("slots: decode steps are not recorded (%s: %s)", *described(problem))
            self._give_up()
            self._steps.clear()
            release_memory(device)
            return False
        self._steps[key] = step
        return True

    def _fill(self, step: _Recorded, token_B: torch.Tensor, position: torch.Tensor, place_B: torch.Tensor) -> None:
        """The live rows' inputs; zeros for all else: a slot that is free gets its first cell written, and no more."""
        step.token_N.zero_()
        step.position.zero_()
        step.length_N.zero_()
        step.token_N[place_B] = token_B
        step.position[..., place_B, :] = position
        step.length_N[place_B] = torch.cat([share.length_P for share in self._memory.step.shares])

    def _place_B(self, shares: Sequence[Share], sizes: Sequence[int]) -> torch.Tensor:
        """Where each live row stands in the recorded step; computed when rows come or go."""
        if self._places is None or self._places[0] is not shares or self._places[1] != sizes:
            starts = [sum(sizes[:number]) for number in range(len(sizes))]
            found = torch.cat([share.index_P + start for share, start in zip(shares, starts, strict=True)])
            self._places = (shares, sizes, found)
        return self._places[2]

    def _forget(self) -> None:
        """Steps over storage that is no more, and the oldest of too many."""
        there = {pool.generation for pool in self._memory.pools}
        for key in [key for key in self._steps if not there.issuperset(generation for generation, _ in key)]:
            del self._steps[key]
        while len(self._steps) >= _MAX_GRAPHS:
            self._steps.popitem(last=False)


def _size(num_slots: int, num_pool_slots: int) -> int:
    """A quarter, half, three quarters or all of a pool: the least that holds so many."""
    quarters = -(-4 * num_slots // num_pool_slots)
    return -(-quarters * num_pool_slots // 4)

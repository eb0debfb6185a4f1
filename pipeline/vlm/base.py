"""What an engine is: samples in, answers out in the order in which they finish."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.records import Answer, EncodedSample

if TYPE_CHECKING:
    import torch


class StopSignal(Protocol):
    """Whether somebody asked the run to end."""

    @property
    def requested(self) -> bool:
        """Start nothing new."""
        ...

    @property
    def expired(self) -> bool:
        """The grace period is over: give up what is in flight."""
        ...


class Batcher(Protocol):
    """Groups samples under a budget and pads a group (tensors.batch.Batcher)."""

    max_rows: int
    max_tokens: int

    def groups(self, samples: Iterator[EncodedSample]) -> Iterator[list[EncodedSample]]: ...

    def collate(self, group: Sequence[EncodedSample]) -> dict[str, torch.Tensor]: ...


@dataclass(slots=True)
class EngineCounts:
    """What an engine did, for the run's statistics."""

    num_batches: int = 0
    num_prompt_tokens: int = 0
    num_padded_prompt_tokens: int = 0  # padding included
    num_decode_steps: int = 0
    num_decode_rows: int = 0  # rows computed over all decode steps, finished ones included
    num_generated_tokens: int = 0
    num_out_of_memory: int = 0


class Engine(Protocol):
    """A way to generate."""

    counts: EngineCounts

    @property
    def numerics(self) -> Mapping[str, str]:
        """What may differ in the last bits between two runs: recorded in each shard."""
        ...

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        """One answer for each sample, in the order in which they finish; samples are pulled as they are needed."""
        ...

"""What an engine is: samples in, answers out in the order in which they finish."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from pipeline.records import Answer, EncodedSample

if TYPE_CHECKING:
    import torch


# Called with each token as it is chosen, on the thread that generates.
OnToken = Callable[[EncodedSample, int], None]

Read = TypeVar("Read")


class Settle(Protocol):
    """Keeps what one start of a run found to be the fastest, for the starts that follow."""

    def __call__(self, name: str, choose: Callable[[], str], read: Callable[[str], Read]) -> Read:
        """What was chosen under this name before, or now.

        choose: decides, if nobody has yet.
        read: makes sense of it; raises ValueError or KeyError if it has none.
        """
        ...


def not_kept(name: str, choose: Callable[[], str], read: Callable[[str], Read]) -> Read:
    """Where there is no run: each start decides for itself."""
    return read(choose())


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
    pads_right: bool  # tokens; images always are
    may_pad_tokens: bool
    may_pad_images: bool

    def groups(self, samples: Iterator[EncodedSample]) -> Iterator[list[EncodedSample]]: ...

    def split(self, window: Sequence[EncodedSample]) -> Iterator[list[EncodedSample]]: ...

    def sorted(self, window: Sequence[EncodedSample]) -> list[EncodedSample]: ...

    def fits(self, first: EncodedSample, other: EncodedSample) -> bool: ...

    def cut(self, sample: EncodedSample, num_tokens: int) -> EncodedSample: ...

    def pads_images(self, group: Sequence[EncodedSample]) -> bool: ...

    def collate(
        self, group: Sequence[EncodedSample], *, num_extra_tokens: int = 0, without: Collection[str] = ()
    ) -> dict[str, torch.Tensor]: ...


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
    num_failed_batches: int = 0  # of several rows, halved until the rows at fault stood alone
    num_images_encoded: int = 0  # rows whose images went through the vision tower; slots only
    trial_seconds: float = 0.0  # of trials before the first rows: what the model bears, what is fastest, parity
    vision_seconds: float = 0.0  # slots only: the static engine has the model encode images within prefill
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Trace:
    """An answer as the engine came to it: its tokens, and the logits each was chosen from."""

    tokens: tuple[int, ...]
    logits_SV: list[torch.Tensor]  # one float32 tensor [V] on the CPU for each step; empty after a search over beams


class CountingEngine(Protocol):
    """An engine that says what it did so far."""

    counts: EngineCounts


class TracingEngine(Protocol):
    """An engine that shows its work."""

    counts: EngineCounts
    max_new_tokens: int

    @property
    def dtype(self) -> str:
        """What the weights are computed in."""
        ...

    def trace(self, samples: Sequence[EncodedSample]) -> list[Trace | None]:
        """Answer samples in batches as a run would, apart from everything counted; None for what fails."""
        ...


class Engine(TracingEngine, Protocol):
    """A way to generate."""

    on_token: OnToken | None  # a search over beams knows its tokens only at the end and does not call it

    @property
    def numerics(self) -> Mapping[str, str]:
        """What may differ in the last bits between two runs: recorded in each shard."""
        ...

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        """One answer for each sample, in the order in which they finish; samples are pulled as they are needed."""
        ...

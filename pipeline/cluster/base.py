"""WHERE a run happens: a cluster starts work(rank, world) for every rank, and knows nothing of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Job:
    """What a cluster runs. All of it can be pickled.

    prepare: makes the plan, once, before any rank begins; whether anything is left to do. Raises what is wrong with the
        settings, so that it is said once.
    work: (rank, world size) does a rank's share, and what other ranks leave. It returns when all is done, whoever did
        it, so that one rank that returns speaks for all.
    output_dir: folder or URL of the results, as it was given: for the names of jobs and the place of their logs.
    command: the words, program first, that start this run anew on another host, in the same folder.
    wait: whether a cluster that could hand the work over follows it instead, until it is done.
    progress: one line about how far the run is, for whoever follows it.
    """

    prepare: Callable[[], bool]
    work: Callable[[int, int], None]
    output_dir: str
    command: Sequence[str] = ()
    wait: bool = False
    progress: Callable[[], str] = str


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Options of a cluster. None of them changes an answer."""

    kind: ClassVar[str] = ""

    def launch(self, job: Job) -> bool:
        """Have the work done by every rank.

        Returns:
            True when all is done; False where it was handed to a scheduler and goes on without this process.

        Raises:
            whatever a rank in this process raises.
            RunFailed, Interrupted: what became of ranks in others; each has said why itself.
        """
        raise NotImplementedError(type(self).__name__)

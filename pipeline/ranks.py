"""Which of several processes this one is, as torchrun, accelerate and our own launchers say in the environment.

No process group is made of them, and they may come and go: they meet in the output folder alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import UsageError


@dataclass(frozen=True, slots=True)
class Ranks:
    """A process among those of a job (RANK of WORLD_SIZE), and among those of its host (LOCAL_...)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def environment(self) -> dict[str, str]:
        """What says so to a process that is started."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
        }


def ranks_given(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """What the environment says; None where it says nothing of ranks.

    Raises:
        UsageError: it contradicts itself.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    found = Ranks(
        _number(environment, "RANK"),
        _number(environment, "WORLD_SIZE"),
        _number(environment, "LOCAL_RANK", environment["RANK"]),
        _number(environment, "LOCAL_WORLD_SIZE", "1"),
    )
    if found.rank >= found.world or not found.local_world:
        raise UsageError(f"{found.environment} in the environment: expected RANK below WORLD_SIZE, counted from 0.")
    return found


def ranks() -> Ranks:
    """What the environment says, or that this process is alone.

    Raises:
        UsageError: it contradicts itself.
    """
    return ranks_given() or Ranks()


def num_own_cores() -> int:
    """Cores of the CPU for this process, where those of its host share them.

    Slurm does not everywhere bind a job to the cores that it was given.
    """
    num_cores = len(os.sched_getaffinity(0))
    given = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if given.isascii() and given.isdigit():
        num_cores = min(num_cores, int(given))
    return max(1, num_cores // ranks().local_world)


def _number(environment: Mapping[str, str], name: str, default: str = "0") -> int:
    given = environment.get(name, default)
    if not given.isascii() or not given.isdigit():
        raise UsageError(f"{name}={given} in the environment: expected a number, 0 or more.")
    return int(given)

"""How many workers the run has, on how many accelerators, as its cluster.* keys and the environment say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.cluster.gpus import GpusConfig, visible_gpus
from pipeline.cluster.ray import RayConfig
from pipeline.cluster.slurm import SlurmConfig
from pipeline.config import RunConfig
from pipeline.errors import UsageError
from pipeline.ranks import Ranks, ranks_given
from pipeline.vlm.options import VllmConfig


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers of a run.

    Args:
        num_workers: at a time.
        accelerators: of each worker; without any a worker counts as one.
        num_here: workers that will share the cores of this machine, where that is known.
        note: what is assumed, if anything is.
    """

    num_workers: int
    accelerators: float = 1.0
    num_here: int = 1
    note: str | None = None

    @contextmanager
    def environment(self) -> Iterator[None]:
        """What is measured within has the share of this machine that a worker will have."""
        if self.num_here == 1 or ranks_given():
            yield
            return
        added = Ranks(0, self.num_workers, 0, self.num_here).environment
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                del os.environ[name]


def fleet(config: RunConfig) -> Fleet:
    """The workers that this configuration asks for.

    Raises:
        UsageError: cluster=gpus without a GPU or a number of workers.
    """
    cluster = config.cluster
    if given := ranks_given():  # torchrun
        return Fleet(given.world, _accelerators(config), given.local_world)
    if isinstance(cluster, GpusConfig):
        gpus = visible_gpus()
        num_workers = cluster.workers or len(gpus)
        if not num_workers:
            raise UsageError(
                "cluster=gpus: no GPU is visible here (nvidia-smi -L lists none). cluster.workers=N counts with N "
                "processes on the CPU; run plan on a machine like those of the run."
            )
        return Fleet(num_workers, _accelerators(config), num_workers)
    elsewhere = "measured on this machine; those of the run may be faster or slower"
    if isinstance(cluster, SlurmConfig):
        num_workers = min(cluster.workers, cluster.max_running or cluster.workers)
        gpus_each = (cluster.gpus or "1").rpartition(":")[2]
        accelerators = float(gpus_each) if gpus_each.isdigit() and int(gpus_each) else 1.0
        return Fleet(num_workers, accelerators, note=elsewhere)
    if isinstance(cluster, RayConfig):
        if cluster.workers is None:
            note = (
                f"cluster.workers is not set, and what a Ray cluster has is not looked up: for one worker; {elsewhere}"
            )
            return Fleet(1, cluster.gpus or 1.0, note=note)
        return Fleet(cluster.workers, cluster.gpus or 1.0, note=elsewhere)
    return Fleet(1, _accelerators(config))


def _accelerators(config: RunConfig) -> float:
    """GPUs that one worker takes here."""
    if isinstance(config.engine, VllmConfig):
        return float(config.engine.tensor_parallel_size)
    if config.vlm.device_map is not None:
        return float(max(1, len(visible_gpus())))
    return 1.0

"""Everything in this process: one worker, and the cluster to debug with.

Under torchrun or accelerate launch it is the worker that the environment says, one of several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.cluster.base import ClusterConfig, Job
from pipeline.ranks import ranks


@dataclass(kw_only=True, slots=True)
class LocalConfig(ClusterConfig):
    """One worker, here."""

    kind: ClassVar[str] = "local"

    def launch(self, job: Job) -> bool:
        """See ClusterConfig."""
        own = ranks()
        job.work(own.rank, own.world)
        return True

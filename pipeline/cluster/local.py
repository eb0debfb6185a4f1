"""Everything in this process: one worker, and the cluster to debug with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.cluster.base import ClusterConfig, Work


@dataclass(kw_only=True, slots=True)
class LocalConfig(ClusterConfig):
    """One worker, here."""

    kind: ClassVar[str] = "local"

    def launch(self, work: Work) -> None:
        work(0, 1)

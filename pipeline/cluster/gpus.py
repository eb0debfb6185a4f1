"""All GPUs of this host: a process for each, or so many processes on its CPU."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pipeline.cluster.base import ClusterConfig, Job
from pipeline.cluster.crew import Crew
from pipeline.errors import UsageError
from pipeline.option import option
from pipeline.ranks import ranks_given


@dataclass(kw_only=True, slots=True)
class GpusConfig(ClusterConfig):
    """A process for each GPU of this host."""

    kind: ClassVar[str] = "gpus"

    workers: int | None = option(None, "processes; null = one for each visible GPU", speed=True, least=1)

    def launch(self, job: Job) -> bool:
        """See ClusterConfig.

        Raises:
            UsageError: there is no GPU, and no number of workers.
        """
        if own := ranks_given():  # torchrun has started a process for each already
            job.work(own.rank, own.world)
            return True
        gpus = visible_gpus()
        num_workers = self.workers or len(gpus)
        if not num_workers:
            raise UsageError(
                "cluster=gpus: no GPU is visible here (nvidia-smi -L lists none). cluster.workers=N starts N processes "
                "on the CPU; cluster=local starts one."
            )
        if job.prepare():
            Crew(job.work, num_workers, gpus).run()
        return True


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What CUDA_VISIBLE_DEVICES would name each by; parts of GPUs (MIG) count as GPUs."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        return names[: names.index("-1")] if "-1" in names else [name for name in names if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed_gpus(listed.stdout) if listed.returncode == 0 else []


def listed_gpus(listing: str) -> list[str]:
    """The identities in what nvidia-smi -L prints; of a GPU that is cut into parts, those of its parts."""
    found: list[str] = []
    for match in re.finditer(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)", listing):
        if match[1].startswith("MIG") and found and found[-1].startswith("GPU"):
            found.pop()  # its parts stand behind it
        found.append(match[1])
    return found

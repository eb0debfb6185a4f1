"""The clusters of the program by their names: what `cluster=` chooses from."""

from __future__ import annotations

from pipeline.cluster.base import ClusterConfig
from pipeline.cluster.gpus import GpusConfig
from pipeline.cluster.local import LocalConfig
from pipeline.cluster.ray import RayConfig
from pipeline.cluster.slurm import SlurmConfig

CLUSTERS: dict[str, type[ClusterConfig]] = {
    cluster.kind: cluster
    for cluster in (
        LocalConfig,
        GpusConfig,
        SlurmConfig,
        RayConfig,
    )
}

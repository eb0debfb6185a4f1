"""A Ray cluster: an actor for each worker, wherever there is room for one."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import ClassVar

from pipeline.cluster.base import ClusterConfig, Job
from pipeline.errors import Interrupted, RunFailed, UsageError
from pipeline.option import option

log = logging.getLogger(__name__)

_LEAST_VERSION = (2, 55)  # with an older one, whoever reads Parquet unpickles what it says (CVE-2026-41486)
_LOCAL = "local"  # what Ray calls a cluster that is started for one program
_CPUS = 8.0  # of a worker that generates on them: more cores add little to one process
_OBJECT_STORE_BYTES = 128 << 20  # nothing large goes through it
_STARTS = 2  # of a cluster on this host: on a busy one its processes take longer than it waits for them
# Read when Ray is imported. Every line that a worker writes is written, without colours, and nobody is told of the run.
_ENVIRONMENT = {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, slots=True)
class Demand:
    """Workers, and what Ray sets aside for each. max_cores: that each may use; None = what its host has, shared."""

    num_workers: int
    gpus: float
    cpus: float
    max_cores: float | None

    def __str__(self) -> str:
        workers = "1 worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        return f"{workers} with {self.gpus:g} GPUs and {self.cpus:g} CPUs each"


@dataclass(kw_only=True, slots=True)
class RayConfig(ClusterConfig):
    """An actor for each GPU of a Ray cluster."""

    kind: ClassVar[str] = "ray"

    address: str | None = option(
        None,
        "the cluster's address, or auto = the one that runs on this host; null = RAY_ADDRESS if that is set, else a "
        "cluster of this host alone, for the length of the run",
        speed=True,
    )
    workers: int | None = option(
        None,
        "actors; null = as many as there are GPUs for, without GPUs one for each 8 CPUs of a host",
        speed=True,
        least=1,
    )
    gpus: float | None = option(
        None, "GPUs of each worker; null = 1 where the cluster has GPUs, else 0", speed=True, least=0
    )
    cpus: float | None = option(
        None,
        "CPUs that are set aside for each worker, which uses no more; null = beside GPUs what its host has, "
        "shared; else up to 8",
        speed=True,
        least=0,
    )
    max_restarts: int = option(16, "how often a worker that died is started again", speed=True, least=0)

    def launch(self, job: Job) -> bool:
        """See ClusterConfig.

        Raises:
            UsageError: Ray is not installed, not reached, or this host has too little for the workers.
        """
        refuse_version(_installed_version())
        address = self.address or os.environ.get("RAY_ADDRESS") or _LOCAL
        if "://" in address:
            raise UsageError(
                f"cluster.address={address}: expected HOST:PORT or auto. Start the command on a machine of the "
                "cluster, or with: ray job submit -- vlm-batch run cluster=ray ..."
            )
        if not job.prepare():
            return True
        from pipeline.cluster.ray_crew import RayCrew, listening

        with listening() as signals, _connected(address) as grows:
            signals.listen()  # Ray has put a handler of its own in the place of ours
            nodes = _nodes()
            demand = self.demand(nodes)
            room = num_fitting(nodes, demand.gpus, demand.cpus)
            if room < demand.num_workers and not grows:
                raise UsageError(
                    f"cluster=ray: no room for {demand}: this host has {shown_resources(nodes)}. Ask for less with "
                    "cluster.workers, cluster.gpus or cluster.cpus, or join a larger cluster with cluster.address."
                )
            log.info("ray: %s; the cluster has %s", demand, shown_resources(nodes))
            RayCrew(job, demand, self.max_restarts, signals).run()
        return True

    def demand(self, nodes: Sequence[Mapping[str, float]]) -> Demand:
        """What is asked of a cluster with these nodes.

        Raises:
            UsageError: a share of several GPUs.
        """
        gpus = float(any(node.get("GPU") for node in nodes) if self.gpus is None else self.gpus)
        if gpus > 1 and not gpus.is_integer():
            raise UsageError(f"cluster.gpus={gpus:g}: expected a whole number, or a part of one GPU such as 0.5.")
        cpus = self.cpus
        if cpus is None:
            cpus = 1.0 if gpus else _widest(nodes, self.workers)
        num_workers = self.workers or max(1, num_fitting(nodes, gpus, cpus))
        return Demand(num_workers, gpus, cpus, self.cpus if gpus else cpus)


def _widest(nodes: Sequence[Mapping[str, float]], num_workers: int | None) -> float:
    """The most CPUs for each, 1 to 8, with which every node takes part and all workers have room."""
    smallest = min((node["CPU"] for node in nodes if node.get("CPU")), default=1.0)
    cpus = max(1.0, min(_CPUS, smallest // 1))
    while cpus > 1 and num_fitting(nodes, 0, cpus) < (num_workers or 1):
        cpus -= 1
    return cpus


def num_fitting(nodes: Sequence[Mapping[str, float]], gpus: float, cpus: float) -> int:
    """Workers that the nodes have room for while nobody else is there; none where that has no bound."""
    asked = {name: amount for name, amount in (("GPU", gpus), ("CPU", cpus)) if amount}
    if not asked:
        return 1 << 30 if nodes else 0
    return sum(min(int(node.get(name, 0) / amount + 1e-6) for name, amount in asked.items()) for node in nodes)


def shown_resources(nodes: Sequence[Mapping[str, float]]) -> str:
    """GPUs and CPUs of all nodes together."""
    gpus, cpus = (sum(node.get(name, 0) for node in nodes) for name in ("GPU", "CPU"))
    return f"{gpus:g} GPUs and {cpus:g} CPUs on {len(nodes)} node{'s' * (len(nodes) != 1)}"


def refuse_version(version: str | None) -> None:
    """Refuse to work without Ray, or with one that is not safe.

    Raises:
        UsageError: how to install one.
    """
    least = ".".join(map(str, _LEAST_VERSION))
    if version is None:
        raise UsageError("cluster=ray needs Ray, which is not installed: pip install 'vlm-batch[ray]'.")
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    if numbers < _LEAST_VERSION:
        raise UsageError(
            f"cluster=ray: Ray {version} is installed, and before {least} it runs code that Parquet files bring along "
            "(CVE-2026-41486): pip install --upgrade 'vlm-batch[ray]', on every node."
        )


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _connected(address: str) -> Iterator[bool]:
    """While it is entered, this process belongs to a Ray cluster; whether that may grow.

    Raises:
        UsageError: it is not reached.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    own = {
        "num_cpus": len(os.sched_getaffinity(0)),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    _begin(address, own if address == _LOCAL else {})
    try:
        with redirect_stdout(sys.stderr):  # where Ray says what workers and nodes say
            yield address != _LOCAL
    finally:
        ray.shutdown()


def _begin(address: str, settings: Mapping[str, object]) -> None:
    """Connect to a cluster, or start one.

    Raises:
        UsageError: it is not reached.
        RunFailed: it does not start on this host.
    """
    import ray

    for tries_left in reversed(range(_STARTS if address == _LOCAL else 1)):
        try:
            ray.init(address=address, logging_level=logging.ERROR, **settings)
            return
        except SystemExit:  # Ray's own answer to SIGTERM while it starts
            raise Interrupted("Stopped by a signal before any worker began. Run the same command again.") from None
        # ConnectionError, RuntimeError, ValueError and plain Exception: where nobody answers, versions differ, no port
        # is free, or its processes take too long to start.
        except Exception as problem:
            ray.shutdown()
            if address != _LOCAL:
                raise UsageError(f"cluster.address={address}: no Ray cluster is reached: {problem}") from problem
            if not tries_left:
                raise RunFailed(f"cluster=ray: Ray does not start on this host: {problem}") from problem
            log.warning("ray: it did not start on this host; once more (%s)", problem)


def _nodes() -> list[Mapping[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]

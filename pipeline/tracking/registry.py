"""The trackers of the program by their names: what `track=` chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any

from pipeline.errors import UsageError
from pipeline.redaction import without_credentials
from pipeline.tracking.base import RunTracker, TrackedRun
from pipeline.tracking.prometheus import PrometheusFile, refuse_prometheus_file
from pipeline.tracking.relay import Relay
from pipeline.tracking.tensorboard import TensorboardTracker
from pipeline.tracking.wandb import WandbTracker
from pipeline.write.file import Place
from pipeline.write.object_store import ObjectPath


class Track(Enum):
    """Where a run's figures go while it runs."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"


TRACKERS: dict[Track, type[RunTracker]] = {Track.tensorboard: TensorboardTracker, Track.wandb: WandbTracker}
FOLDER = "tracking"  # of a tracker's files, in the output folder


def refuse_trackers(track: Track, track_dir: str | None, prometheus_file: str | None, output_dir: Place) -> None:
    """Refuse what cannot work, before a model loads.

    Raises:
        UsageError: a package or a key is missing, or a path is none that files can lie in.
    """
    if prometheus_file is not None:
        refuse_prometheus_file(prometheus_file)
    if track_dir is not None and "://" in track_dir:
        raise UsageError(f"track_dir={track_dir}: expected a folder of this host.")
    if track is Track.none:
        return
    TRACKERS[track].refuse()
    if TRACKERS[track].needs_folder and _folder(track_dir, output_dir) is None:
        raise UsageError(
            f"track={track.value} writes files as it goes, which {output_dir} does not take: give track_dir=FOLDER."
        )


def relays(
    track: Track,
    track_dir: str | None,
    prometheus_file: str | None,
    *,
    output_dir: Place,
    plan_id: str,
    settings: Mapping[str, Any],
    rank: int,
) -> Sequence[Relay]:
    """Those of one rank: rank 0 tells what all do, every rank has a file for Prometheus. Nothing is opened yet.

    Raises:
        UsageError: as refuse_trackers().
    """
    refuse_trackers(track if rank == 0 else Track.none, track_dir, prometheus_file, output_dir)
    found = []
    address = without_credentials(str(output_dir if isinstance(output_dir, ObjectPath) else output_dir.absolute()))
    if track is not Track.none and rank == 0:
        name, folder = address.rstrip("/").rpartition("/")[2], _folder(track_dir, output_dir)
        run = TrackedRun(address, name, plan_id, folder, dict(settings))
        found.append(Relay(f"track={track.value}", partial(TRACKERS[track], run)))
    if prometheus_file is not None:
        opened = partial(PrometheusFile, prometheus_file, address, rank)
        found.append(Relay(f"prometheus_file={prometheus_file}", opened))
    return found


def _folder(track_dir: str | None, output_dir: Place) -> str | None:
    if track_dir is not None:
        return track_dir
    return None if isinstance(output_dir, ObjectPath) else str(output_dir / FOLDER)

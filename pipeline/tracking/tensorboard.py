"""TensorBoard: event files in a folder, a point on each curve for a heartbeat."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar

from pipeline.errors import UsageError
from pipeline.tracking.base import Figures, TrackedRun, is_installed


class TensorboardTracker:
    """See RunTracker. The step of a point is the number of rows done, so that a resumed run goes on with its curves.

    Written by tensorboardX, which neither imports TensorFlow where that is installed, nor torch.
    """

    needs_folder: ClassVar[bool] = True

    def __init__(self, run: TrackedRun) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(run.folder, flush_secs=10)

    @staticmethod
    def refuse() -> None:
        """See RunTracker."""
        if not is_installed("tensorboardX"):
            raise UsageError("track=tensorboard needs the extra tensorboard: pip install 'vlm-batch[tensorboard]'.")

    def log(self, figures: Figures) -> None:
        """See Tracker."""
        if figures.run is None:
            return
        for name, value in asdict(figures.run).items():
            self._writer.add_scalar(name, value, figures.run.rows_done, walltime=figures.worker["updated"])

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()

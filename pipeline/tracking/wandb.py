"""Weights & Biases: a run there for a run here. Project, entity, server, mode and key come from its own variables."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from typing import ClassVar

from pipeline.errors import UsageError
from pipeline.tracking.base import Figures, TrackedRun, is_installed

log = logging.getLogger(__name__)

_PROJECT = "vlm-batch"  # unless WANDB_PROJECT says another
_WITHOUT_KEY = ("offline", "dryrun", "disabled")


class WandbTracker:
    """See RunTracker. The run there has the plan's id, so that a resumed run goes on with its curves."""

    needs_folder: ClassVar[bool] = False

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        if run.folder is not None:
            os.makedirs(run.folder, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=os.environ.get("WANDB_NAME") or run.name,
            id=os.environ.get("WANDB_RUN_ID") or run.plan_id,
            dir=os.environ.get("WANDB_DIR") or run.folder,
            resume="allow",
            config=run.settings | {"output_dir": run.output_dir},
            # Output of rows and source code stay here; wandb's own words would run into the progress bar.
            settings=wandb.Settings(console="off", save_code=False, disable_git=True, silent=True),
        )
        self._run.define_metric("*", step_metric="rows_done")
        log.info("track=wandb: %s", self._run.url or f"{self._run.dir} (wandb sync sends it)")

    @staticmethod
    def refuse() -> None:
        """See RunTracker. Without a key wandb would ask for one at the terminal, in the middle of the run."""
        if not is_installed("wandb"):
            raise UsageError("track=wandb needs the extra wandb: pip install 'vlm-batch[wandb]'.")
        if os.environ.get("WANDB_MODE") in _WITHOUT_KEY or os.environ.get("WANDB_API_KEY"):
            return
        import wandb

        if not wandb.api.api_key:
            raise UsageError(
                "track=wandb: there is no key. Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to keep "
                "the figures in files until `wandb sync`."
            )

    def log(self, figures: Figures) -> None:
        """See Tracker."""
        if figures.run is not None:
            self._run.log(asdict(figures.run))

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()

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
_INIT_SECONDS = 30.0  # a server that does not answer holds up the end of a run that is shorter
_FINISH_SECONDS = 8.0  # what is not sent by then stays in its files, for `wandb sync`
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
            settings=wandb.Settings(
                console="off",  # what the run prints stays here
                save_code=False,
                disable_git=True,
                silent=True,  # its words would run into the progress bar
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
            ),
        )
        self._run.define_metric("*", step_metric="rows_done")
        there = f"{self._run.sync_dir} until `wandb sync`" if self._run.offline else self._run.url
        log.info("track=wandb: %s", there)

    @staticmethod
    def refuse() -> None:
        """See RunTracker. Without a key wandb would ask for one at the terminal, in the middle of the run."""
        if not is_installed("wandb"):
            raise UsageError("track=wandb needs the extra wandb: pip install 'vlm-batch[wandb]'.")
        if os.environ.get("WANDB_MODE") in _WITHOUT_KEY:
            return
        import wandb

        try:
            has_key = wandb.login(prompt=False, verify=False)
        except (wandb.errors.Error, ValueError) as problem:  # a key of a wrong form
            raise UsageError(f"track=wandb: {problem}") from None
        if not has_key:
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

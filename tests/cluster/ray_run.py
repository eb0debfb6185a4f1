"""vlm-batch with the fake model of tests/torture, slowly, in actors, too: python ray_run.py run ..."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

TORTURE = str(Path(__file__).resolve().parents[1] / "torture")


def slow_run(*arguments: Any) -> None:
    """What a worker does. An actor has this function alone, not the module."""
    sys.path.insert(0, TORTURE)
    import fake_model

    from pipeline import run

    fake_model.install()
    os.environ[fake_model.BATCH_SECONDS] = "0.1"
    getattr(run, "true_run", run.run)(*arguments)


if __name__ == "__main__":
    sys.path.insert(0, TORTURE)
    import fake_model

    from pipeline import run
    from pipeline.__main__ import main

    fake_model.install()
    run.true_run, run.run = run.run, slow_run  # type: ignore[attr-defined, assignment]
    sys.exit(main())

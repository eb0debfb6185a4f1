"""vlm-batch diff: two runs, or two prompts of one, record by record."""

from __future__ import annotations

from pipeline.commands.base import Call
from pipeline.diff.options import DiffOptions

Options = DiffOptions


def execute(call: Call) -> int:
    from pipeline.diff.command import run_diff  # --help needs no Arrow

    return run_diff(call.options)

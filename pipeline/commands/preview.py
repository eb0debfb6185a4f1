"""vlm-batch preview: answers of a few rows, or a conversation."""

from __future__ import annotations

from pipeline.commands.base import Call
from pipeline.preview.options import PreviewOptions

Options = PreviewOptions


def execute(call: Call) -> int:
    from pipeline.preview.command import run_preview  # --help needs no model

    return run_preview(call.composed().config, call.options)

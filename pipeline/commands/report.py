"""vlm-batch report: a run as one HTML file."""

from __future__ import annotations

from pipeline.commands.base import Call
from pipeline.report.plots import HOW_TO_DRAW, can_draw
from pipeline.report.report import ReportOptions, write_report
from pipeline.shown import shown

Options = ReportOptions


def execute(call: Call) -> int:
    path = write_report(call.output_dir, call.options)
    print(shown(f"report   {path}"))
    if not can_draw():
        print(f"plots    none; {HOW_TO_DRAW}")
    return 0

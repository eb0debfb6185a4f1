"""vlm-batch export: the answers of a run in the form that something else reads."""

from __future__ import annotations

from pipeline.commands.base import Call
from pipeline.export.options import ExportOptions
from pipeline.shown import shown

Options = ExportOptions


def execute(call: Call) -> int:
    from pipeline.export.formats import export_lines, exported  # --help needs no pyarrow

    selection, where = exported(call.output_dir, call.options)
    for line in export_lines(selection, where, call.options):
        print(shown(line))
    return 1 if selection.failed else 0

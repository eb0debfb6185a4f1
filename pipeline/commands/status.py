"""vlm-batch status: how far a run is."""

from __future__ import annotations

from pipeline.commands.base import Call
from pipeline.shown import shown
from pipeline.status import StatusOptions, read_status, status_lines

Options = StatusOptions


def execute(call: Call) -> int:
    output_dir = call.output_dir
    if call.options.watch:
        from pipeline.watch.command import watch  # rich takes a moment to import

        watch(output_dir, call.options.idle_seconds)
        return 0
    print(shown("\n".join(status_lines(output_dir, read_status(output_dir)))), flush=True)
    return 0

"""vlm-batch status: how far a run is."""

from __future__ import annotations

import time

from pipeline.commands.base import Call
from pipeline.shown import shown
from pipeline.status import StatusOptions, read_status, status_lines

Options = StatusOptions
_WATCH_SECONDS = 5.0


def execute(call: Call) -> int:
    output_dir = call.output_dir
    while True:
        status = read_status(output_dir)
        print(shown("\n".join(status_lines(output_dir, status))), flush=True)
        if not call.options.watch or status.complete:
            return 0
        time.sleep(_WATCH_SECONDS)
        print()

"""vlm-batch plan: what a run will cost and take; writes nothing."""

from __future__ import annotations

import json
import signal
import sys

from pipeline.commands.base import Call
from pipeline.errors import Interrupted
from pipeline.forecast.options import PlanOptions
from pipeline.shown import shown

Options = PlanOptions


def execute(call: Call) -> int:
    from pipeline.forecast.figures import figures
    from pipeline.forecast.forecast import forecast  # --help needs none of it
    from pipeline.forecast.lines import forecast_lines

    config = call.composed().config
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        found = forecast(config, call.options)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # below the ^C
        raise Interrupted("Stopped; nothing was written.") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    if call.options.json:
        print(json.dumps(figures(found), indent=1))
        return 0
    for line in forecast_lines(found):
        print(shown(line))
    return 0

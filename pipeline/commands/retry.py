"""vlm-batch retry: the error rows of a finished run once more."""

from __future__ import annotations

from pipeline.agenda import RetryOptions, refuse_retry
from pipeline.commands.base import Call
from pipeline.commands.run import launch
from pipeline.errors import UsageError
from pipeline.planning import Resume

Options = RetryOptions


def execute(call: Call) -> int:
    config, only = call.composed().config, call.options.only
    if config.resume is Resume.overwrite:
        raise UsageError("resume=overwrite begins anew; retry asks again what is there. Leave one of them out.")
    refuse_retry(config.output_path, only)
    return launch(config, call, only)

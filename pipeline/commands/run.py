"""vlm-batch run: the job, and what is said of it at the end."""

from __future__ import annotations

import time
from collections.abc import Collection
from functools import partial

from pipeline.cluster.base import Job
from pipeline.commands.base import Call
from pipeline.config import RunConfig
from pipeline.errors import ErrorBudgetExceeded
from pipeline.manifest import write_manifest
from pipeline.planning import Resume
from pipeline.ranks import ranks
from pipeline.redaction import without_credentials
from pipeline.report.report import REPORT_FILE
from pipeline.run import prepare, run
from pipeline.shown import shown
from pipeline.status import phases, progress_line, read_status, status_lines
from pipeline.tracking.registry import refuse_trackers

Options = None


def execute(call: Call) -> int:
    return launch(call.composed().config, call, None)


def launch(config: RunConfig, call: Call, only: Collection[str] | None) -> int:
    """Have the cluster do the job; the exit code.

    only: as pipeline.run.run() takes it.
    """
    output_dir = config.output_path
    refuse_trackers(config.track, config.track_dir, config.prometheus_file, output_dir)
    started = time.time()
    job = Job(
        partial(prepare, config, only),
        partial(run, config, only),
        str(output_dir),
        command=call.command_line,
        wait=config.wait,
        progress=partial(progress_line, output_dir),
    )
    if not config.cluster.launch(job):
        return 0  # a scheduler has it
    if ranks().rank:
        return 0  # what is said now is said by rank 0
    status = read_status(output_dir, ended=True)
    write_manifest(output_dir, status)  # which a kill may have left undone
    fresh = [worker for worker in status.workers if worker["started"] >= started]
    if not fresh:
        done = f"All {status.plan.num_records:,} rows are done already" if only is None else "No such error row is left"
        if not status.plan.num_records:
            done = f"No row was found in {without_credentials(status.plan.root)}"
        print(shown(f"{done}; no model was loaded."))
        if config.resume is Resume.extend:
            print("input    nothing was added to it")
        else:
            print(f"input    as listed {status.plan.created}; resume=extend takes in what was added since")
    for line in status_lines(output_dir, status):
        print(shown(line))
    for worker in fresh:
        for kind, example in worker["error_examples"].items():
            print(shown(f"example  {kind}: {example}").replace("\n", "\\n"))  # a row cannot forge a line
    if fresh:
        rows, tokens = (sum(worker[f"{what}_per_second"] for worker in fresh) for what in ("rows", "tokens"))
        together = f", {len(fresh)} workers" if len(fresh) > 1 else ""
        print(f"speed    {rows:.1f} rows/s, {tokens:.0f} tokens/s{together}")
        print(f"time     {', '.join(f'{name} {share:.0%}' for name, share in phases(fresh).items())}")
    if status.plan.num_shards:
        print(shown(f"data     {output_dir / 'data'}/part-*.parquet"))
    if config.report and (output_dir / REPORT_FILE).is_file():
        print(shown(f"report   {output_dir / REPORT_FILE}"))
    if status.complete and 0 < status.plan.num_records == sum(status.errors.values()):
        print("failed   every row; the examples above say why" if fresh else "failed   every row")
        return 0 if config.max_error_rate is None else ErrorBudgetExceeded.exit_code
    return 0

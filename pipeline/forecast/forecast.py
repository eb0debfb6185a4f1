"""A forecast from beginning to end: what a run would find, a look at some rows, some answers, an estimate."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.assembly import refuse_model, refuse_processor
from pipeline.config import RunConfig
from pipeline.forecast.estimate import Disk, Estimate, disk, estimated
from pipeline.forecast.fleet import Fleet, fleet
from pipeline.forecast.foreseen import Foreseen, foreseen
from pipeline.forecast.options import PlanOptions
from pipeline.forecast.sample import sampled_rows
from pipeline.forecast.survey import Survey, survey
from pipeline.forecast.volume import Volume, volume
from pipeline.forecast.warm_run import WarmRun, pace, warm_run
from pipeline.plan import read_plan
from pipeline.planning import Resume
from pipeline.prompt.template import Template
from pipeline.ranks import num_own_cores
from pipeline.records import Answer, RecordKey
from pipeline.vlm.identity import ModelIdentity, identify, identify_processor

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Forecast:
    """All that is known of a run before it is started. What needs the model is None without it."""

    config: RunConfig
    found: Foreseen
    team: Fleet
    survey: Survey | None  # None where nothing is left to do
    warm: WarmRun | None
    disk: Disk | None
    estimate: Estimate | None
    price_per_hour: float | None
    load: float  # of this machine when it began: what waits to compute, for each core


def forecast(config: RunConfig, options: PlanOptions) -> Forecast:
    """Look, measure, estimate. Nothing is written.

    Raises:
        UsageError, RunFailed: what `run` would raise before its first row; or the model fails its checks.
    """
    options.check()
    load = os.getloadavg()[0] / num_own_cores()
    team = fleet(config)
    with team.environment():
        return _forecast(config, options, team, load)


def _forecast(config: RunConfig, options: PlanOptions, team: Fleet, load: float) -> Forecast:
    identity: ModelIdentity | None = None
    if options.model:
        identity = identify(config.vlm)
        if read_plan(config.output_path) is None or config.resume is Resume.overwrite:
            refuse_model(config, identity)
    looks_with = identify_processor(config.vlm) if options.counts_tokens and identity is None else identity

    def refuse(template: Template) -> None:
        if looks_with is not None:
            refuse_processor(config, looks_with, template)

    found = foreseen(config, identity, refuse)
    if not found.num_left:
        return Forecast(config, found, team, None, None, None, None, options.price_per_hour, load)
    chosen = sampled_rows(found.ranges, options.sample_rows, config.seed)
    log.info("%s of %s rows are looked at ...", f"{len(chosen):,}", f"{found.num_rows_left:,}")
    until_look = _age_seconds()
    seen = survey(config, found, looks_with, chosen, options.seconds)
    warm: WarmRun | None = None
    if identity is not None:
        log.info("loading the model ...")
        warm = warm_run(config, found, identity, seen, chosen, options.seconds)
    written = _volume(config, found, seen, warm, identity)
    estimate = None
    if warm is not None:
        expected = pace(config, found, seen, warm, writing=written.seconds)
        start_seconds = until_look + warm.loading_seconds + warm.starting_seconds
        estimate = estimated(found, warm, expected, team, start_seconds)
    space = disk(config, found, seen, written, team, has_answers=warm is not None)
    return Forecast(config, found, team, seen, warm, space, estimate, options.price_per_hour, load)


def _volume(
    config: RunConfig, found: Foreseen, seen: Survey, warm: WarmRun | None, identity: ModelIdentity | None
) -> Volume:
    answers = warm.answers if warm is not None else []
    if not answers:
        answers = [
            (Answer(RecordKey(row.index, one.name, 0), row.id, one.facts, fault=one.fault), row.columns)
            for row in seen.rows
            for one in row.prompts
        ]
    constants = {
        "model_id": identity.model_id if identity else config.vlm.path,
        "model_revision": identity.revision if identity else None,
        "run_id": found.plan.plan_id,
    }
    return volume(answers, found.schema, constants, config.write.compression)


def _age_seconds() -> float:
    """Since this process was started, imports included; where the system does not say, since it began to compute."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # field 22 of proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()

"""ONE WORKER, TOP TO BOTTOM: read this first.

    plan -> shards to do -> rows -> prompts, images, tensors (worker processes) -> batches -> answers -> ledger

The engine is fed one endless stream across shard borders, so it never drains at a shard's end.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.agenda import Agenda
from pipeline.assembly import build_engine, parity_check, refuse_model, refuse_processor, trackers, workers
from pipeline.config import RunConfig, answer_settings
from pipeline.dataset.base import Inputs
from pipeline.errors import ErrorBudgetExceeded, Interrupted, RunFailed, UsageError
from pipeline.feed import Feed
from pipeline.intake import Intake
from pipeline.interruption import Interruption
from pipeline.kernel_choices import KernelChoices
from pipeline.manifest import conclude
from pipeline.meter import Meter
from pipeline.plan import Plan, changed_versions, read_inputs, read_plan
from pipeline.planning import Resume, make_folders, open_plan
from pipeline.prompt.template import Template
from pipeline.records import Answer
from pipeline.report.report import report_at_end
from pipeline.tally import Tally
from pipeline.tensors.batch import Batcher
from pipeline.vlm.base import Engine
from pipeline.vlm.constraint import constraint_of
from pipeline.vlm.generation import effective_settings
from pipeline.vlm.identity import ModelIdentity, identify
from pipeline.watchdog import Watchdog
from pipeline.write.claim import Claims
from pipeline.write.ledger import Ledger
from pipeline.write.schema import OutputSchema, output_schema

if TYPE_CHECKING:
    from pipeline.vlm.parity import ParityCheck

log = logging.getLogger(__name__)

ROWS_BEFORE_BUDGET = 200  # records that are done before max_error_rate is looked at


def run(config: RunConfig, only: Collection[str] | None, rank: int, world: int) -> None:
    """Do this rank's share of the job; returns when every record of the share is published.

    only: None for the first answers; else the error records of these stages or types, or all, are asked once more.

    Raises:
        UsageError: the settings cannot work, or differ from the plan's; nothing was touched.
        Interrupted: a signal came; what is finished is on disk.
        RunFailed: the run cannot go on; what is finished is on disk.
    """
    with Interruption(config.grace_seconds) as stop:
        if run_share(config, only, rank, world, stop):
            is_last = conclude(config.output_path, is_retry=only is not None)
            if is_last and config.report:
                report_at_end(config.output_path, is_stopped=lambda: stop.requested)


def run_share(config: RunConfig, only: Collection[str] | None, rank: int, world: int, stop: Interruption) -> bool:
    """The story itself: plan, workers, engine, ledger. Whether there was anything to do."""
    output_dir = config.output_path
    identity, plan, agenda = begun(config, only, rank, world)
    tally = Tally(plan.num_records)
    agenda.settle(tally)
    todo = agenda.shards()
    if not todo:
        return False  # before anything heavy is imported
    stop.check()
    log.info(
        "%s rows to answer in %s shards, %s done already%s; loading the model ...",
        f"{agenda.num_records(todo):,}",
        f"{len(todo):,}",
        f"{tally.num_done:,}",
        ", and what journals hold" if agenda.has_journals else "",
    )

    updated = changed_versions(plan)
    make_folders(output_dir)
    inputs = read_inputs(output_dir, plan, address=config.dataset.path)
    template, schema = checked(config, inputs)
    relays = trackers(config, plan, rank)
    meter = Meter(tally, output_dir / "stats", rank=rank, plan_id=plan.plan_id, relays=relays)
    attempt_id = f"{rank}-{uuid.uuid4().hex[:12]}"
    engine: Engine | None = None
    parity: ParityCheck | None = None
    goal = agenda.goal(
        schema,
        constants={"model_id": identity.model_id, "model_revision": identity.revision, "run_id": plan.plan_id},
        compression=config.write.compression,
    )
    ledger = Ledger(
        output_dir,
        goal,
        attempt_id=attempt_id,
        numerics=lambda: dict(engine.numerics) | updated if engine else {},
        tally=tally,
        sync_seconds=config.write.sync_seconds,
    )
    claims = Claims(output_dir / "work", attempt_id)
    batcher = Batcher(
        max_rows=config.engine.max_batch_rows,
        max_tokens=config.engine.max_batch_tokens,
        max_new_tokens=config.generation.max_new_tokens,
    )

    def record(answer: Answer) -> None:
        with meter.writing():
            ledger.record(answer)
        check_budget(config.max_error_rate, tally)
        meter.show()

    state = "failed"
    give_up = stop.give_up if config.stall_exit else None
    with (
        claims,
        meter,
        workers(config, plan, identity, template, batcher) as pool,
        Watchdog(config.stall_seconds, tally, pool, lambda: engine.counts if engine else None, give_up),
    ):
        stop.on_request(pool.stop_feeding)
        stop.last_words = ledger.sync
        try:
            engine = build_engine(config, identity, batcher, stop, settle=KernelChoices(output_dir))
            parity = parity_check(config, engine, batcher, num_records=agenda.num_records(todo))
            meter.loaded(engine)
            kept_images = config.dataset.image_column if config.write.keep_images else None
            feed = Feed(plan, config.dataset.open(inputs), goal, ledger, claims, kept_images)
            for tasks in feed.streams(todo):
                meter.show()
                samples = Intake(meter.waiting(pool.results(tasks)), record, pool.has_results, ledger.taken)
                parity.check(samples.first(parity.num_due))
                for answer in engine.answers(samples):
                    record(answer)
                if stop.requested:
                    break
            if left := feed.unfinished(todo):
                stop.check()
                raise RunFailed(f"the work ended with {len(left)} shards unfinished: a bug")
            state = "done"
        except Interrupted:
            state = "interrupted"
            raise
        finally:
            try:
                ledger.close()
            finally:  # what cannot be journalled must not leave a worker that reads as running
                by_engine = {"engine": asdict(engine.counts), "numerics": dict(engine.numerics)} if engine else {}
                compared = parity.report if parity else {}
                meter.end(state, {"num_shards_published": ledger.num_published} | by_engine | compared)
    return True


def prepare(config: RunConfig, only: Collection[str] | None) -> bool:
    """Make the plan that the ranks will find; whether anything is left to do.

    Raises:
        UsageError, RunFailed: as run().
    """
    _, _, agenda = begun(config, only)
    return bool(agenda.shards())


def begun(
    config: RunConfig, only: Collection[str] | None, rank: int = 0, world: int = 1
) -> tuple[ModelIdentity, Plan, Agenda]:
    """What a start finds, or makes: the model's identity, the plan, and what is to be done of it."""
    identity = identify(config.vlm)
    if read_plan(config.output_path) is None or config.resume is Resume.overwrite:
        refuse_model(config, identity)  # before a source is read or a file written
    plan = planned(config, identity, partial(refuse_processor, config, identity))
    return identity, plan, Agenda(config.output_path, plan, only, rank, world)


def planned(config: RunConfig, identity: ModelIdentity, refuse: Callable[[Template], None]) -> Plan:
    """The folder's plan, or a new one. What can be known to be wrong is refused before it is written.

    refuse: raises where the templates, which are known once the source is listed, do not suit the model.
    """

    def scan() -> Inputs:
        inputs = scanned(config)
        refuse(checked(config, inputs)[0])
        return inputs

    return open_plan(
        config.output_path,
        settings_of(config, identity),
        scan=scan,
        max_rows=config.dataset.max_rows,
        shard_rows=config.write.shard_rows,
        prompt_names=config.prompt_names,
        num_samples=config.generation.n,
        resume=config.resume,
    )


def settings_of(config: RunConfig, identity: ModelIdentity) -> dict[str, Any]:
    """Everything that changes answers, the source's identity aside: what a start compares with the folder's plan."""
    generation = effective_settings(config.generation, identity.generation_config)
    return answer_settings(config) | generation.fingerprint | identity.settings


def scanned(config: RunConfig) -> Inputs:
    """The source, listed and counted; what is odd about it is said once.

    Raises:
        UsageError: the source is not there, or the settings do not fit its columns.
    """
    inputs = config.dataset.scan()
    for warning in inputs.warnings:
        log.warning("%s", warning)
    checked(config, inputs)
    return inputs


def checked(config: RunConfig, inputs: Inputs) -> tuple[Template, OutputSchema]:
    """Templates and output columns, checked against the columns of the source.

    Raises:
        UsageError: a template or an option names a column that is not there, or an output column has no free name.
    """
    columns = inputs.columns.names
    template = config.prompt.build(columns, has_messages=config.dataset.messages_column is not None)
    for key in ("max_new_tokens_column", "choices_column"):
        name = getattr(config.generation, key)
        if name is not None and name not in columns:
            raise UsageError(f"generation.{key}={name}: there is no such column; the columns are {columns}.")
    dataset = config.dataset
    schema = output_schema(
        config.write,
        inputs.columns,
        keep=dataset.columns,
        id_column=dataset.id_column,
        image_column=dataset.image_column,
        is_constrained=constraint_of(config.generation) is not None,
    )
    return template, schema


def check_budget(max_error_rate: float | None, tally: Tally) -> None:
    """Stop a run that is broken as a whole.

    Raises:
        ErrorBudgetExceeded: more than max_error_rate of the records failed, of at least 200.
    """
    if max_error_rate is None or tally.num_done < ROWS_BEFORE_BUDGET:
        return
    share = tally.num_errors / tally.num_done
    if share > max_error_rate:
        kind, number = tally.errors.most_common(1)[0]
        raise ErrorBudgetExceeded(
            f"{tally.num_errors} of {tally.num_done} rows failed ({share:.0%}), more than max_error_rate="
            f"{max_error_rate:g}. Commonest: {kind} ({number} rows). Mend the cause, or raise max_error_rate (null = "
            "never stop), and run the same command again: it goes on where it stopped."
        )

"""The parts of a worker, put together from the configuration: its processes, its engine, its checks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config import RunConfig
from pipeline.errors import UsageError
from pipeline.plan import Plan
from pipeline.preparation import Preparation, PreparationOptions, Task
from pipeline.prompt.template import PromptFormat, Template
from pipeline.ranks import num_own_cores
from pipeline.records import Answer, EncodedSample
from pipeline.tensors.batch import Batcher
from pipeline.tensors.pool import WorkerPool, start_fork_server
from pipeline.tensors.processor import Processor, ProcessorSource
from pipeline.tensors.shipping import Shipping
from pipeline.tracking.registry import relays
from pipeline.tracking.relay import Relay
from pipeline.vlm.base import Engine, Settle, StopSignal, not_kept
from pipeline.vlm.constraint import constraint_of
from pipeline.vlm.generation import effective_settings, log_settings, slots_obstacle
from pipeline.vlm.identity import ModelIdentity
from pipeline.vlm.options import ImageTransfer, SlotsConfig, VllmConfig

if TYPE_CHECKING:
    from pipeline.vlm.parity import ParityCheck

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_LONG_RUN = 100  # records; below that the parity check would cost more than it tells
# Imported once by the fork server: a worker, or its replacement, starts in milliseconds.
PRELOAD = (
    "pipeline.preparation",
    "torch",
    "transformers.processing_utils",
    "transformers.models.auto.processing_auto",
    "PIL.Image",
)


def refuse_model(config: RunConfig, identity: ModelIdentity) -> None:
    """Refuse a model that cannot work here, without reading its weights.

    Raises:
        UsageError: a setting of vlm does not fit the model, the device, or what is installed; or one of generation the
            engine that was asked for, or it has no meaning.
        RunFailed: it is no image-text-to-text model, or not whole.
    """
    start_fork_server(PRELOAD)  # torch takes seconds to import: the workers' import begins now, beside this one
    from pipeline.vlm.load import check_model

    if constraint := constraint_of(config.generation):
        from pipeline.vlm.grammar import check_constraint

        check_constraint(constraint)
    if isinstance(config.engine, VllmConfig):
        from pipeline.vlm.vllm_load import check_vllm

        check_vllm(config.engine, config.vlm, effective_settings(config.generation, identity.generation_config))
    elif config.engine.kind == SlotsConfig.kind:
        settings = effective_settings(config.generation, identity.generation_config)
        if obstacle := slots_obstacle(settings):
            raise UsageError(f"engine=slots: {obstacle}. engine=auto takes padded batches where the slots do not fit.")
    if isinstance(config.engine, SlotsConfig):
        from pipeline.vlm.device import placement
        from pipeline.vlm.slots.attention import check_decode_attention

        check_decode_attention(config.engine.decode_attention, placement(config.vlm).device)
    check_model(config.vlm, identity)


def refuse_processor(config: RunConfig, identity: ModelIdentity, template: Template) -> None:
    """Refuse a processor, its options or a chat template that do not fit the run, before a plan is written.

    Raises:
        UsageError: an option of vlm.processor does not exist, or the tokenizer does not bear constrained answers.
        RunFailed: the processor cannot be loaded, or prepares no prompt of the run's shape.
    """
    start_fork_server(PRELOAD)  # by now, where an old plan is extended
    processor = Processor(preparation_options(config, identity, template, fingerprint="").processor)
    if constraint := constraint_of(config.generation):
        from pipeline.vlm.grammar import token_table

        token_table(constraint, processor.tokenizer)


def workers(
    config: RunConfig, plan: Plan, identity: ModelIdentity, template: Template, batcher: Batcher
) -> WorkerPool[Task, list[EncodedSample | Answer]]:
    """The processes that render, open and encode; they start while the model loads."""
    shipping = chosen_shipping(config, identity, template)
    options = preparation_options(config, identity, template, plan.fingerprint, plan.created[:10], shipping)
    return preparation_pool(config, options, batcher)


def trackers(config: RunConfig, plan: Plan, rank: int) -> Sequence[Relay]:
    """Who is told what this rank does.

    Raises:
        UsageError: a tracker cannot work here.
    """
    return relays(
        config.track,
        config.track_dir,
        config.prometheus_file,
        output_dir=config.output_path,
        plan_id=plan.plan_id,
        settings=plan.settings,
        rank=rank,
    )


def preparation_pool(
    config: RunConfig, options: PreparationOptions, batcher: Batcher
) -> WorkerPool[Task, list[EncodedSample | Answer]]:
    """Such processes, for whatever rows they are given."""
    return worker_pool(config, partial(Preparation, options), max_waiting=2 * batcher.num_window_rows)


def worker_pool(
    config: RunConfig,
    build: Callable[[], Callable[[Task], Result]],
    *,
    max_waiting: int,
    preload: tuple[str, ...] = PRELOAD,
) -> WorkerPool[Task, Result]:
    """Processes as many and as bounded as the run's, for whatever is to be made of a row (see WorkerPool)."""
    return WorkerPool(
        build,
        num_workers=num_workers(config),
        task_seconds=config.engine.worker_timeout_seconds,
        memory_bytes=config.engine.worker_memory_bytes,
        max_waiting=max_waiting,
        preload=preload,
    )


def chosen_shipping(config: RunConfig, identity: ModelIdentity, template: Template) -> Shipping:
    """How images travel from the workers to the engine: as asked for, where the processor's pixels come out exactly."""
    from pipeline.tensors.proof import compact_flaw
    from pipeline.tensors.replay import PixelReplay
    from pipeline.vlm.device import placement

    transfer = config.engine.image_transfer
    if transfer is ImageTransfer.processed or isinstance(config.engine, VllmConfig):
        return "processed"
    device = placement(config.vlm).device
    if transfer is ImageTransfer.auto and device.type != "cuda":
        return "processed"  # what is saved in the workers would be paid for beside the model, on the same cores
    options = preparation_options(config, identity, template, fingerprint="").processor
    if flaw := compact_flaw(Processor(options), PixelReplay(device)):
        log.info("images are processed by the workers, as otherwise: %s", flaw)
        return "processed"
    return "resized" if transfer is ImageTransfer.resized else "decoded"


def preparation_options(
    config: RunConfig,
    identity: ModelIdentity,
    template: Template,
    fingerprint: str,
    date: str | None = None,
    shipping: Shipping = "processed",
) -> PreparationOptions:
    """What has to be known to render, open and encode a row.

    date: what a chat template says is today: the day of the plan, so that a run resumed tomorrow asks the same.
    """
    return PreparationOptions(
        template=template,
        processor=ProcessorSource(
            folder=str(identity.folder),
            options=config.vlm.processor,
            trust_remote_code=config.vlm.trust_remote_code,
            plain=config.prompt.format is PromptFormat.plain,
            chat_template=config.prompt.chat_template_text(),
            date=date,
            sketches=template.sketches(has_images=config.dataset.image_column is not None),
            own_text=template.own_text,
            max_tokens=identity.max_tokens,
            shipping=shipping,
        ),
        fingerprint=fingerprint,
        max_image_pixels=config.prompt.max_image_pixels,
        allow_urls=config.dataset.allow_urls,
        keep_images=config.write.keep_images,
        max_new_tokens=config.generation.max_new_tokens,
        max_new_tokens_column=config.generation.max_new_tokens_column,
        choices_column=config.generation.choices_column,
    )


def num_workers(config: RunConfig) -> int:
    """How many of these processes a worker of the run has."""
    return config.engine.num_workers or default_num_workers()


def default_num_workers() -> int:
    """Half of the cores this process may use: the other half generates, or feeds the accelerator."""
    return max(1, min(16, num_own_cores() // 2))


def build_engine(
    config: RunConfig, identity: ModelIdentity, batcher: Batcher, stop: StopSignal, *, settle: Settle = not_kept
) -> Engine:
    """Load the model and put an engine around it. torch is imported here, and in the worker processes.

    settle: keeps the choice of kernels.
    """
    if isinstance(config.engine, VllmConfig):
        from pipeline.vlm.vllm_load import load_vllm_engine

        return load_vllm_engine(config.vlm, config.engine, config.generation, identity, seed=config.seed, stop=stop)
    from pipeline.tensors.replay import PixelReplay
    from pipeline.vlm.answer import Ending
    from pipeline.vlm.grammar import AnswerForm, Grammar
    from pipeline.vlm.load import load_model
    from pipeline.vlm.sampling import Sampler
    from pipeline.vlm.slots.engine import SlotsEngine
    from pipeline.vlm.static import StaticEngine

    constraint = constraint_of(config.generation)
    form = None if constraint is None else AnswerForm(constraint)  # refuses what is missing before a model is loaded
    loaded = load_model(config.vlm, identity, num_threads=num_own_cores())
    batcher.pad_id, batcher.replay = loaded.pad_id, PixelReplay(loaded.device)
    generation = config.generation
    settings = effective_settings(generation, identity.generation_config)
    log_settings(settings, identity.generation_config)
    ending = Ending(
        loaded.tokenizer,
        eos_ids=loaded.eos_ids,
        stop=generation.stop,
        ignore_eos=generation.ignore_eos,
        max_repeats=generation.max_repeats,
        form=form,
    )
    grammar = None
    if constraint is not None:
        grammar = Grammar(constraint, loaded.tokenizer, ending.eos_ids, num_threads=num_own_cores())
    parts: dict[str, Any] = {
        "loaded": loaded,
        "batcher": batcher,
        "sampler": Sampler(settings.sampling, config.seed),
        "ending": ending,
        "grammar": grammar,
        "settings": settings,
        "max_new_tokens": generation.max_new_tokens,
        "stop": stop,
    }
    static = StaticEngine(**parts)
    if not isinstance(config.engine, SlotsConfig):
        return static
    if obstacle := slots_obstacle(settings, is_encoder_decoder=loaded.is_encoder_decoder):
        log.info("engine: padded batches (%s)", obstacle)
        return static
    return SlotsEngine(**parts, static=static, options=config.engine, settle=settle)


def parity_check(config: RunConfig, engine: Engine, batcher: Batcher, *, num_records: int) -> ParityCheck:
    """What compares a long run's first rows, alone and in a batch."""
    from pipeline.vlm.parity import ParityCheck

    due = num_records >= _LONG_RUN and config.engine.max_batch_rows > 1
    return ParityCheck(engine, num_rows=config.engine.parity_rows if due else 0, expanded=batcher.expanded)

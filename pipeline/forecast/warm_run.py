"""Some of the sampled rows, answered by the engine of the run, and what each part of that took.

Rows go in rounds: a few, and then as many as there is time for. A round is prepared before its first row is computed,
as far as memory allows: beside it the engine would share a CPU with the worker processes for a moment, and not as in a
long run all the time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from pipeline.assembly import build_engine, parity_check, workers
from pipeline.config import RunConfig
from pipeline.forecast.foreseen import Foreseen
from pipeline.forecast.pace import Decoding, Length, Pace, StepCost, Steps, fitted
from pipeline.forecast.survey import Survey, tasks
from pipeline.intake import Intake
from pipeline.preparation import Task
from pipeline.ranks import num_own_cores
from pipeline.records import Answer
from pipeline.tensors.batch import Batcher
from pipeline.vlm.base import Engine, EngineCounts
from pipeline.vlm.identity import ModelIdentity

log = logging.getLogger(__name__)

Item = TypeVar("Item")

_FIRST_ROWS = 8  # of which the next round is guessed
_LEAST_ROWS = 4  # that a further round is worth
_FULL = 0.8  # of the slots that the run may have: fewer in a round of more rows, and memory is what bounds them
_AHEAD_BYTES = 1 << 29  # of prepared rows, as the queue of the slots holds them


@dataclass(slots=True)
class WarmRun:
    """What was measured. Seconds are of the engine's side, for all rows together."""

    engine: str
    device: str
    records_per_row: int
    indices: set[int] = field(default_factory=set)  # of the rows
    loading_seconds: float = 0.0  # from when the rows were looked at until the engine was there
    starting_seconds: float = 0.0  # from there to the first round: workers ready, trials, parity check
    vision_seconds: float = 0.0
    num_vision_rows: int = 0  # whose images were computed
    prefill_seconds: float = 0.0
    other_seconds: float = 0.0
    num_generated_steps: int = 0  # tokens but the first of each answer
    num_slots: int = 1
    in_slots: bool = True
    max_cells: int | None = None  # tokens that all slots hold; None where there are no slots
    num_out_of_memory: int = 0
    steps: list[Steps] = field(default_factory=list)
    lengths: dict[int, list[Length]] = field(default_factory=dict)  # of the answers, by row
    answers: list[tuple[Answer, Mapping[str, Any]]] = field(default_factory=list)  # with the columns of their rows

    @property
    def num_rows(self) -> float:
        """Answered, with all that is asked about each; where time was up there is a part of one among them."""
        return len(self.answers) / self.records_per_row

    @property
    def all_lengths(self) -> list[Length]:
        return [length for lengths in self.lengths.values() for length in lengths]


class Room(NamedTuple):
    """Of one prompt."""

    num_prompt_tokens: int
    max_new_tokens: int


class _TimeUp:
    """A StopSignal: from some moment on nothing new is begun, and what is begun is finished."""

    def __init__(self) -> None:
        self.deadline = float("inf")

    @property
    def requested(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def expired(self) -> bool:
        return False


def warm_run(
    config: RunConfig,
    found: Foreseen,
    identity: ModelIdentity,
    survey: Survey,
    chosen: Sequence[int],
    seconds: float,
) -> WarmRun:
    """Answer some of the rows that were looked at.

    chosen: their positions, in the order in which they are taken.
    seconds: to begin rows in, once the engine is ready.

    Raises:
        RunFailed: the model cannot be loaded, or fails the parity check.
    """
    began = time.monotonic()
    batcher = Batcher(
        max_rows=config.engine.max_batch_rows,
        max_tokens=config.engine.max_batch_tokens,
        max_new_tokens=config.generation.max_new_tokens,
    )
    time_up = _TimeUp()
    seen = {row.index for row in survey.rows}
    todo = [index for index in chosen if index in seen]
    with workers(config, found.plan, identity, found.template, batcher) as pool:
        engine = build_engine(config, identity, batcher, time_up)
        loaded = time.monotonic()
        parity = parity_check(config, engine, batcher, num_records=found.num_left)
        num_records = found.plan.records_per_row
        warm = WarmRun(config.engine.kind, str(engine.numerics.get("device", "")), num_records)
        warm.loading_seconds = loaded - began
        rooms = _rooms(survey, config.generation.max_new_tokens)
        sample_bytes = max((one.num_bytes for one in survey.prompts), default=1) or 1
        ahead = max(1, _AHEAD_BYTES // sample_bytes)
        num_next, deadline = _FIRST_ROWS, 0.0
        while todo and num_next:
            batch, todo = todo[:num_next], todo[num_next:]
            columns: dict[int, Mapping[str, Any]] = {}
            results = _Timed(pool.results(_kept(tasks(config, found, batch), columns)))
            faults: list[Answer] = []
            samples = Intake(results, faults.append, pool.has_results)
            parity.check(samples.first(parity.num_due))
            samples.first(min(ahead, len(batch) * num_records))
            if not deadline:
                warm.starting_seconds = time.monotonic() - loaded
                deadline = time_up.deadline = time.monotonic() + seconds
            answers = list(_watched(engine, samples, results, warm))
            for answer in chain(answers, faults):
                warm.indices.add(answer.key.row_index)
                warm.answers.append((answer, columns.get(answer.key.row_index, {})))
                if answer.fault is None and answer.num_generated_tokens:
                    room = rooms.get((answer.key.row_index, answer.key.prompt_name))
                    cap = room.max_new_tokens if room else config.generation.max_new_tokens
                    lengths = warm.lengths.setdefault(answer.key.row_index, [])
                    lengths.append(Length(answer.num_generated_tokens, cap))
            _note_room(engine, warm, config, rooms, len(answers))
            if time_up.requested:
                break
            num_next = _affordable(pace(config, found, survey, warm), len(todo), deadline - time.monotonic())
    return warm


def pace(config: RunConfig, found: Foreseen, survey: Survey, warm: WarmRun, writing: float = 0.0) -> Pace:
    """What a row takes one worker, from what some rows took.

    writing: seconds, of a record.
    """
    num_rows, per_row = max(1.0, warm.num_rows), found.plan.records_per_row
    lengths = warm.all_lengths
    if lengths and _as_long_as_allowed(config):  # which is known of all rows that were looked at
        rooms = _rooms(survey, config.generation.max_new_tokens).values()
        lengths = [Length(room.max_new_tokens, room.max_new_tokens) for room in rooms] * found.plan.num_samples
    share_answered = len(warm.all_lengths) / max(1, len(warm.answers))  # error rows take no steps
    decoding = None
    cost = fitted(warm.steps) if any(one.num_steps for one in warm.steps) else StepCost(0.0, 0.0)
    if lengths and (cost.per_step or cost.per_row):
        computed = sum(one.num_rows for one in warm.steps)
        decoding = Decoding(
            cost=cost,
            num_rows=warm.num_slots,
            lengths=lengths,
            in_slots=warm.in_slots,
            waste=max(1.0, computed / warm.num_generated_steps) if warm.num_generated_steps else 1.0,
        )
    if decoding is not None and share_answered < 1:
        num_none = round(len(lengths) * (1 / share_answered - 1))
        decoding = replace(decoding, lengths=[*lengths, *[Length(1, 1)] * num_none])
    shares_cores = warm.device.startswith("cpu")
    return Pace(
        vision=warm.vision_seconds / max(1, warm.num_vision_rows) * survey.share_with_images,
        prefill=warm.prefill_seconds / num_rows * _longer(survey, warm.indices),
        other=warm.other_seconds / num_rows,
        writing=writing * per_row,
        preparing=survey.cpu_seconds / num_own_cores() if shares_cores else 0.0,
        input=1 / (survey.rows_per_second * survey.num_workers) if survey.rows_per_second else 0.0,
        records_per_row=per_row,
        decoding=decoding,
    )


def _as_long_as_allowed(config: RunConfig) -> bool:
    """Whether every answer goes on to its limit."""
    generation = config.generation
    return generation.ignore_eos and not generation.stop and generation.max_repeats is None


def _rooms(survey: Survey, max_new_tokens: int) -> dict[tuple[int, str], Room]:
    """Of each prompt that can be asked, by row and name."""
    return {
        (row.index, one.name): Room(one.facts.num_prompt_tokens or 0, one.max_new_tokens or max_new_tokens)
        for row in survey.rows
        for one in row.prompts
        if one.fault is None
    }


def _longer(survey: Survey, indices: Collection[int]) -> float:
    """How much longer the prompts of all rows are than those of the rows that were answered."""
    tokens = {row.index: sum(one.facts.num_prompt_tokens or 0 for one in row.prompts) for row in survey.rows}
    among = [tokens[index] for index in indices if index in tokens]
    return (sum(tokens.values()) / len(tokens)) / (sum(among) / len(among)) if sum(among) else 1.0


def _affordable(expected: Pace, num_left: int, seconds: float) -> int:
    """How many rows a round may have; 0 where it is not worth it."""
    if seconds <= 0 or not num_left:
        return 0
    few, many = 0, num_left
    while few < many:
        middle = (few + many + 1) // 2
        few, many = (middle, many) if expected.seconds(middle) <= seconds else (few, middle - 1)
    return few if few >= min(_LEAST_ROWS, num_left) else 0


def _watched(engine: Engine, samples: Intake, results: _Timed[Any], warm: WarmRun) -> Iterator[Answer]:
    """The answers of a round; what the engine did for them is added to `warm`."""
    first = last = replace(engine.counts)
    began, waited = time.perf_counter(), results.seconds
    for answer in engine.answers(samples):
        now = replace(engine.counts)
        if now.num_decode_steps > last.num_decode_steps:
            warm.steps.append(_between(last, now))
            last = now
        if answer.num_generated_tokens:
            warm.num_generated_steps += answer.num_generated_tokens - 1
        yield answer
    end = replace(engine.counts)
    if end.num_decode_steps > last.num_decode_steps:
        warm.steps.append(_between(last, end))
    phases = 0.0
    for name in ("vision_seconds", "prefill_seconds"):
        spent = getattr(end, name) - getattr(first, name)
        setattr(warm, name, getattr(warm, name) + spent)
        phases += spent
    phases += end.decode_seconds - first.decode_seconds
    trial = end.trial_seconds - first.trial_seconds
    warm.starting_seconds += trial
    warm.num_vision_rows += end.num_images_encoded - first.num_images_encoded
    whole = time.perf_counter() - began - (results.seconds - waited)
    warm.other_seconds += max(0.0, whole - phases - trial)
    warm.num_out_of_memory = end.num_out_of_memory


def _between(before: EngineCounts, now: EngineCounts) -> Steps:
    return Steps(
        now.num_decode_steps - before.num_decode_steps,
        now.num_decode_rows - before.num_decode_rows,
        now.decode_seconds - before.decode_seconds,
    )


def _note_room(
    engine: Engine, warm: WarmRun, config: RunConfig, rooms: Mapping[tuple[int, str], Room], num_answers: int
) -> None:
    """How many rows the engine decodes together, as far as is known by now."""
    name = engine.numerics.get("engine", warm.engine)
    warm.engine, warm.in_slots = name, name != "static"
    options = config.engine
    num_slots = options.max_batch_rows
    widths = [room.num_prompt_tokens + room.max_new_tokens for room in rooms.values()]
    if name == "static":
        width = max(1, sum(widths) // max(1, len(widths)))
        num_slots = max(1, min(num_slots, options.max_batch_tokens // width))
    fit = getattr(engine, "fit", None)  # of the slots
    warm.max_cells = fit.max_cells if fit is not None and name == "slots" else None
    most = max((one.num_rows / one.num_steps for one in warm.steps), default=0.0)
    if name == "slots" and num_answers * _FULL > num_slots > most / _FULL:
        num_slots = max(1, round(most))  # more do not fit into memory
    warm.num_slots = num_slots


class _Timed(Iterator[Item]):
    """Passes items through and times how long they were waited for."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self.seconds = 0.0

    def __next__(self) -> Item:
        began = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - began


def _kept(rows: Iterator[Task], columns: dict[int, Mapping[str, Any]]) -> Iterator[Task]:
    for task in rows:
        columns[task.row.index] = task.row.columns
        yield task

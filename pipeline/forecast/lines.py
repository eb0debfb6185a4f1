"""A forecast as people read it: what it costs, what limits it, what is wrong with the data. In this order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pipeline.forecast.estimate import Disk
from pipeline.forecast.forecast import Forecast
from pipeline.forecast.interval import Interval, mean, quantile
from pipeline.forecast.survey import Survey
from pipeline.forecast.warm_run import WarmRun
from pipeline.meter import duration
from pipeline.records import FinishReason

_MOST_WARNINGS = 3
_BUSY = 0.5  # programs that compute beside this one, for each core
_LEAST_SHARE = 0.01  # of the time, for a phase to be named


def forecast_lines(found: Forecast) -> Iterator[str]:
    """The table, line by line."""
    yield from _cost(found)
    if found.survey is None:
        return
    yield ""
    yield from _speed(found)
    yield ""
    yield from _data(found, found.survey)
    notes = list(_notes(found))
    if notes:
        yield ""
    yield from (f"note     {note}" for note in notes)


def _cost(found: Forecast) -> Iterator[str]:
    plan, estimate = found.found.plan, found.estimate
    asked = f"{plan.num_rows:,} rows"
    if plan.records_per_row > 1:
        asked += f" x {len(plan.prompt_names)} prompts x {plan.num_samples} samples = {plan.num_records:,} answers"
    asked += f" in {plan.num_shards:,} {'shard' if plan.num_shards == 1 else 'shards'}"
    if not found.found.is_new:
        done = found.found.num_done
        asked += f"; {done:,} are done ({done / max(1, plan.num_records):.0%}), {found.found.num_left:,} are left"
    yield f"job      {asked}"
    if found.survey is None:
        yield "time     nothing is left to do"
        return
    if estimate is not None:
        workers = "1 worker" if estimate.num_workers == 1 else f"{estimate.num_workers:,} workers"
        yield (
            f"time     {_span(estimate.seconds, duration)}, {workers}; {duration(estimate.start_seconds)} are start-up"
        )
        hours = estimate.accelerator_hours
        yield f"hours    {_span(hours, _hours)} {_unit(found.warm)}-hours"
        if found.price_per_hour is not None:
            price = hours.scaled(found.price_per_hour)
            yield f"price    {_span(price, _price)} at price_per_hour={found.price_per_hour:g}"
        else:
            yield "price    set price_per_hour="
    if found.disk is not None:
        yield f"disk     {_disk(found.disk)}"


def _speed(found: Forecast) -> Iterator[str]:
    seen, estimate, warm = found.survey, found.estimate, found.warm
    assert seen is not None
    together = seen.rows_per_second * seen.num_workers
    processes = "1 process" if seen.num_workers == 1 else f"{seen.num_workers} processes"
    what = "opened, decoded and encoded" if seen.has_tokens else "opened and decoded"
    if estimate is not None and warm is not None:
        model, given = estimate.model_rows_per_second, estimate.input_rows_per_second
        yield (f"speed    {_rate(estimate.rows_per_second)} rows/s, {estimate.tokens_per_second:,.0f} tokens/s in all")
        if estimate.limit == "start-up":
            yield "limit    start-up: the rows take less time than loading the model"
        elif estimate.limit == "model":
            times = f"{given / model:.1f} times as fast" if model else "faster"
            yield f"limit    the model, {_rate(model)} rows/s per worker; input is {times}"
        else:
            yield (
                f"limit    input, {_rate(given)} rows/s per worker; the model could do {_rate(model)}: more cores, or "
                "engine.num_workers"
            )
        whole = max(1e-9, sum(estimate.phases.values()))
        shares = {name: value / whole for name, value in estimate.phases.items() if value / whole >= _LEAST_SHARE}
        ordered = sorted(shares.items(), key=lambda pair: -pair[1])
        yield f"phases   {', '.join(f'{name} {share:.0%}' for name, share in ordered)}"
    yield f"input    {_rate(together)} rows/s {what} by {processes} of a worker ({_rate(seen.rows_per_second)} by each)"


def _data(found: Forecast, seen: Survey) -> Iterator[str]:
    num_seen = len(seen.rows)
    yield f"rows     {num_seen:,} looked at, spread over {seen.num_all:,}"
    bad = seen.fault_share
    yield f"bad      {_span(bad, _percent)} of the rows will be error rows" if num_seen else "bad      unknown"
    for kind, row_id, reason in seen.examples:
        yield f"           {seen.faults[kind]:,} x {kind}, as {_one_line(row_id)}: {_one_line(reason)}"
    widths = [width for one in seen.prompts for width in one.facts.image_width]
    heights = [height for one in seen.prompts for height in one.facts.image_height]
    if widths:
        sizes = sorted(zip(widths, heights, strict=True), key=lambda size: size[0] * size[1])
        few, usual, many = sizes[0], sizes[len(sizes) // 2], sizes[-1]
        row_bytes = sum(row.image_bytes for row in seen.rows) / len(seen.rows)
        yield (
            f"images   {few[0]} x {few[1]} to {many[0]} x {many[1]} pixels, in the middle {usual[0]} x {usual[1]}; "
            f"{_bytes(row_bytes)} a row"
        )
    tokens = [one.facts.num_prompt_tokens for one in seen.prompts if one.facts.num_prompt_tokens is not None]
    if tokens:
        pictures = [one.facts.num_image_tokens for one in seen.prompts if one.facts.num_image_tokens is not None]
        of_images = f", of them {_range(pictures)} for images" if pictures else ""
        yield f"prompts  {_range(tokens)} tokens{of_images}"
    if seen.num_too_long:
        yield f"           {seen.num_too_long:,} of {num_seen:,} rows have a prompt longer than the model's context"
    if found.warm is not None:
        yield from _answers(found, found.warm)


def _answers(found: Forecast, warm: WarmRun) -> Iterator[str]:
    lengths = [length.num_tokens for length in warm.all_lengths]
    if not lengths:
        yield f"answers  none: all of the {len(warm.indices):,} rows that were asked are error rows"
        return
    average = mean(lengths, found.found.num_left)
    cut = sum(answer.finish_reason is FinishReason.LENGTH for answer, _ in warm.answers)
    limit = found.config.generation.max_new_tokens
    yield (
        f"answers  {_span(average, lambda value: f'{value:.1f}')} tokens, {_range(lengths)}; "
        f"{cut / len(lengths):.0%} end at their limit (max_new_tokens={limit}); of {len(warm.indices):,} rows"
    )


def _notes(found: Forecast) -> Iterator[str]:
    seen, warm, space, config = found.survey, found.warm, found.disk, found.config
    assert seen is not None
    if found.team.note:
        yield found.team.note
    if found.load > _BUSY and warm is not None:
        yield f"this machine was busy ({found.load:.1f} others for each core): times hold for one that is as busy"
    if warm is None:
        yield "time and price need the model: model=true"
    bad = seen.fault_share.value
    if config.max_error_rate is not None and bad > config.max_error_rate:
        yield f"the run would stop: more error rows than max_error_rate={config.max_error_rate:g}"
    if len(seen.rows) < seen.num_chosen:
        yield "looking took longer than seconds= allows; the first of the sample are what was looked at"
    if warm is not None and warm.max_cells is not None:
        over = sum(
            (one.facts.num_prompt_tokens or 0) + (one.max_new_tokens or 0) > warm.max_cells for one in seen.prompts
        )
        if over:
            yield f"{over:,} prompts are larger than all slots together ({warm.max_cells:,} tokens): one at a time"
        if warm.num_slots < config.engine.max_batch_rows and warm.engine == "slots":
            yield f"memory holds {warm.num_slots} rows, of engine.max_batch_rows={config.engine.max_batch_rows}"
    if warm is not None and warm.num_out_of_memory:
        yield f"out of memory {warm.num_out_of_memory} times; engine.max_batch_rows or max_batch_tokens may be lower"
    if space is not None and space.is_short:
        yield f"the disk is too small: {_bytes(space.needed_bytes)} of {_bytes(space.free_bytes or 0)} that are free"
    for warning, number in list(seen.warnings.items())[:_MOST_WARNINGS]:
        yield f"{number:,} of {len(seen.rows):,} rows: {_one_line(warning)}"
    if found.found.is_new:
        yield "nothing was written; the same words with run in place of plan start it"


def _disk(space: Disk) -> str:
    said = f"{_bytes(space.data_bytes)} to be written"
    if space.images_bytes:
        said += f", of which {_bytes(space.images_bytes)} are kept images"
    if not space.has_answers:
        said += " and the answers"
    said += f"; {_bytes(space.passing_bytes)} more while it runs"
    return said + (f"; {_bytes(space.free_bytes)} are free" if space.free_bytes is not None else "")


def _unit(warm: WarmRun | None) -> str:
    return "worker" if warm is not None and warm.device.startswith("cpu") else "accelerator"


def _span(value: Interval, text: Callable[[float], str]) -> str:
    middle, low, high = text(value.value), text(value.low), text(value.high)
    return middle if low == high else f"{middle} ({low} to {high})"


def _range(values: Sequence[int]) -> str:
    return (
        f"{min(values):,} to {max(values):,}, median {quantile(values, 0.5):,.0f}, 95 % {quantile(values, 0.95):,.0f}"
    )


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2f}" if hours >= 0.1 else f"{hours:.4f}"


def _price(price: float) -> str:
    return f"{price:,.2f}" if price >= 0.1 else f"{price:.4f}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.3g}"


def _bytes(number: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")  # a row cannot forge a line

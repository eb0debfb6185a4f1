"""A forecast as JSON, for programs: every figure of the table, durations in seconds, sizes in bytes."""

from __future__ import annotations

from typing import Any

from pipeline.forecast.forecast import Forecast
from pipeline.forecast.interval import LEVEL, mean, quantiles
from pipeline.forecast.survey import Survey
from pipeline.forecast.warm_run import WarmRun
from pipeline.records import FinishReason
from pipeline.shown import shown


def figures(found: Forecast) -> dict[str, Any]:
    """The forecast; what was not measured is null. Intervals are {value, low, high}, for nine times of ten."""
    plan, estimate, space = found.found.plan, found.estimate, found.disk
    result: dict[str, Any] = {
        "interval_level": LEVEL,
        "num_rows": plan.num_rows,
        "num_records": plan.num_records,
        "num_records_done": found.found.num_done,
        "num_records_left": found.found.num_left,
        "num_shards": plan.num_shards,
        "num_workers": found.team.num_workers,
        "accelerators_per_worker": found.team.accelerators,
        "time": None,
        "price": None,
        "disk": None,
        "data": _data(found.survey) if found.survey else None,
        "answers": _answers(found, found.warm) if found.warm else None,
        "load_per_core": found.load,
        "note": found.team.note,
    }
    if estimate is not None:
        result["time"] = {
            "seconds": estimate.seconds.parts,
            "start_seconds": estimate.start_seconds,
            "phase_seconds": estimate.phases,  # of one worker
            "accelerator_hours": estimate.accelerator_hours.parts,
            "rows_per_second": estimate.rows_per_second,
            "tokens_per_second": estimate.tokens_per_second,
            "model_rows_per_second": estimate.model_rows_per_second,  # of one worker
            "input_rows_per_second": estimate.input_rows_per_second,
            "limit": estimate.limit,
        }
        if found.price_per_hour is not None:
            result["price"] = estimate.accelerator_hours.scaled(found.price_per_hour).parts
    if space is not None:
        result["disk"] = {
            "data_bytes": round(space.data_bytes),
            "images_bytes": round(space.images_bytes),
            "passing_bytes": round(space.passing_bytes),
            "inputs_bytes": space.inputs_bytes,
            "free_bytes": space.free_bytes,
            "has_answers": space.has_answers,
        }
    return result


def _data(seen: Survey) -> dict[str, Any]:
    facts = [one.facts for one in seen.prompts]
    return {
        "num_rows_seen": len(seen.rows),
        "num_rows": seen.num_all,
        "error_share": seen.fault_share.parts,
        "errors": dict(seen.faults),
        "error_examples": [
            {"error": kind, "id": shown(row_id), "message": shown(reason)} for kind, row_id, reason in seen.examples
        ],
        "warnings": {shown(warning): number for warning, number in seen.warnings.items()},
        "num_prompts_too_long": seen.num_too_long,
        "image_width": quantiles([width for one in facts for width in one.image_width]),
        "image_height": quantiles([height for one in facts for height in one.image_height]),
        "image_bytes": quantiles([row.image_bytes for row in seen.rows]),
        "num_prompt_tokens": quantiles([one.num_prompt_tokens for one in facts if one.num_prompt_tokens is not None]),
        "num_image_tokens": quantiles([one.num_image_tokens for one in facts if one.num_image_tokens is not None]),
        "num_processes": seen.num_workers,
        "rows_per_second_of_a_process": seen.rows_per_second,
        "row_seconds": quantiles(seen.row_seconds),
    }


def _answers(found: Forecast, warm: WarmRun) -> dict[str, Any]:
    lengths = [length.num_tokens for length in warm.all_lengths]
    endings = [answer.finish_reason for answer, _ in warm.answers if answer.finish_reason is not None]
    return {
        "num_rows_answered": len(warm.indices),
        "engine": warm.engine,
        "device": warm.device,
        "rows_at_a_time": warm.num_slots,
        "slot_tokens": warm.max_cells,
        "num_out_of_memory": warm.num_out_of_memory,
        "mean_num_generated_tokens": mean(lengths, found.found.num_left).parts if lengths else None,
        "num_generated_tokens": quantiles(lengths),
        "length_share": endings.count(FinishReason.LENGTH) / len(endings) if endings else None,
    }

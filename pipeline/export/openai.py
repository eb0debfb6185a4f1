"""format=openai: the lines of OpenAI's batch output, so that what reads those reads these.

A line is a row and one of its prompts; its samples are the choices. `custom_id` is the row's id, with /PROMPT behind it
where several prompts are exported. An error record is a line with `error` and without a response.
https://platform.openai.com/docs/api-reference/batch/request-output
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

from pipeline.export.destination import new_file, refuse_taken, target
from pipeline.export.jsonl import line
from pipeline.export.options import COMMON, Errors, ExportOptions
from pipeline.export.selection import Selection
from pipeline.write.file import Place

OBEYED = COMMON | {"to", "errors"}
ERRORS = Errors.include
_COLUMNS = (
    "row_index", "id", "prompt_name", "sample_index", "status", "error_stage", "error_type", "error_message",
    "response", "finish_reason", "num_prompt_tokens", "num_generated_tokens", "model_id",
)  # fmt: skip
# Clients know stop, length and a few that do not come up here; an answer that was ended for repeating itself was cut.
_FINISH_REASONS = {"repetition": "length"}


def export(selection: Selection, options: ExportOptions, output_dir: Place) -> str:
    """Write the file; where it is, as a phrase.

    Raises:
        UsageError: it is there already.
        RunFailed: it cannot be written.
    """
    path = target(output_dir, options.to, "openai.jsonl")
    refuse_taken(path, options.exists)
    created = int(datetime.fromisoformat(selection.plan.created).timestamp())
    with new_file(path) as file:
        for table in selection.tables(_COLUMNS):
            for _, group in groupby(table.to_pylist(), key=lambda row: (row["row_index"], row["prompt_name"])):
                rows = list(group)
                answers = [row for row in rows if row["status"] == "ok"]
                file.write(line(_request(answers or rows, selection, created)))
                selection.num_written += len(answers or rows)
                if answers and len(rows) > len(answers):
                    selection.left_out["errors beside other samples of their row"] += len(rows) - len(answers)
    return f"in {path}"


def _request(rows: Sequence[dict[str, Any]], selection: Selection, created: int) -> dict[str, Any]:
    """One line. rows: the answers to one prompt; or, where there is none, its errors."""
    first = rows[0]
    plan, prompt_name = selection.plan, first["prompt_name"]
    name = f"{plan.plan_id[:12]}-{first['row_index']}-{plan.prompt_names.index(prompt_name)}"
    custom_id = first["id"] if len(selection.prompt_names) == 1 else f"{first['id']}/{prompt_name}"
    found: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": custom_id, "response": None, "error": None}
    if first["status"] == "error":
        kind = f"{first['error_stage']}/{first['error_type']}"
        return found | {"error": {"code": kind, "message": first["error_message"]}}
    num_prompt, num_answer = first["num_prompt_tokens"] or 0, sum(row["num_generated_tokens"] or 0 for row in rows)
    choices = [
        {
            "index": row["sample_index"],
            "message": {"role": "assistant", "content": row["response"], "refusal": None},
            "logprobs": None,
            "finish_reason": _FINISH_REASONS.get(row["finish_reason"], row["finish_reason"]),
        }
        for row in rows
    ]
    body = {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": created,
        "model": first["model_id"],
        "choices": choices,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_answer,
            "total_tokens": num_prompt + num_answer,
        },
    }
    return found | {"response": {"status_code": 200, "request_id": f"req_{name}", "body": body}}

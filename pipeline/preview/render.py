"""Prompts as JSON: what the model's chat template makes of each, without the model."""

from __future__ import annotations

import json
from typing import Any, TextIO

from pipeline.config import RunConfig
from pipeline.preparation import Preparation, Task
from pipeline.preview.options import PreviewOptions
from pipeline.preview.rows import chosen
from pipeline.records import Answer, EncodedSample
from pipeline.vlm.identity import identify_processor


def render(config: RunConfig, options: PreviewOptions, out: TextIO) -> int:
    """Print one JSON object per prompt, in ASCII; the exit code, 1 where no prompt could be rendered.

    Raises:
        UsageError: the settings cannot work, or there is no such row.
        RunFailed: the processor cannot be loaded.
    """
    tasks, preparation = chosen(config, options, identify_processor(config.vlm))
    num_rendered = 0
    for task in tasks:
        for item in preparation(Task(task.row, tuple(key for key in task.keys if key.sample_index == 0))):
            num_rendered += isinstance(item, EncodedSample)
            print(json.dumps(_rendered(task, item, preparation)), file=out, flush=True)
    return 0 if num_rendered else 1


def _rendered(task: Task, item: EncodedSample | Answer, preparation: Preparation) -> dict[str, Any]:
    found: dict[str, Any] = {"id": item.id, "prompt_name": item.key.prompt_name}
    if isinstance(item, Answer):
        assert item.fault is not None
        fault = item.fault
        return found | {"error_stage": fault.stage, "error_type": fault.kind, "error_message": fault.message}
    return found | {
        "text": preparation.text(task.row, item.key.prompt_name),
        "num_prompt_tokens": item.facts.num_prompt_tokens,
        "num_image_tokens": item.facts.num_image_tokens,
    }

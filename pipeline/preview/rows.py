"""Rows of the dataset, shown with their answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipeline.assembly import preparation_options
from pipeline.config import RunConfig
from pipeline.errors import RunFailed, UsageError
from pipeline.preparation import Preparation, Task
from pipeline.preview.options import PreviewOptions
from pipeline.preview.speaker import Speaker
from pipeline.preview.terminal import Terminal
from pipeline.records import Answer, EncodedSample, PromptFacts, RecordKey, Row
from pipeline.run import checked, scanned
from pipeline.tensors.worker import silenced_libraries
from pipeline.vlm.identity import ModelIdentity, identify

_NUM_ROWS = 3
_FINGERPRINT = "preview"  # row keys are not shown
_REPEATED = 3  # so many equal tokens in a row are shown as one and their number


def preview(config: RunConfig, options: PreviewOptions, terminal: Terminal) -> int:
    """Show rows and stream their answers; the exit code, 1 where no row was answered.

    The rows are prepared here and not by worker processes, which take longer to start than a row takes.

    Raises:
        UsageError: the settings cannot work, or there is no such row.
        RunFailed: the model cannot be loaded.
    """
    identity = identify(config.vlm)
    tasks, preparation = chosen(config, options, identity)
    speaker = Speaker(config, identity, preparation.processor, terminal)
    num_answered = 0
    for task in tasks:
        terminal.line(f"row {task.row.index}", task.row.id)
        with silenced_libraries():
            items = preparation(task)
        for number, item in enumerate(items):
            if number % config.generation.n == 0:
                _show(task.row, item, config, options, preparation, terminal)
            if isinstance(item, Answer):
                assert item.fault is not None
                speaker.fault(item.fault)
            else:
                label = "answer" if config.generation.n == 1 else f"answer {item.key.sample_index}"
                num_answered += speaker.answer(item, label).fault is None
        terminal.end()
    return 0 if num_answered else 1


def chosen(config: RunConfig, options: PreviewOptions, identity: ModelIdentity) -> tuple[Iterator[Task], Preparation]:
    """The rows that were asked for, each with all its prompts and samples, and what prepares them.

    Raises:
        UsageError: the settings do not fit the dataset, or there is no such row.
        RunFailed: the dataset is empty.
    """
    inputs = scanned(config)
    dataset = config.dataset.open(inputs)
    num_rows = len(dataset) if config.dataset.max_rows is None else min(len(dataset), config.dataset.max_rows)
    if not num_rows:
        raise RunFailed(f"dataset.path={config.dataset.path}: there is no row to show.")
    wanted = list(range(min(_NUM_ROWS, num_rows))) if options.rows is None else options.rows
    if max(wanted) >= num_rows:
        raise UsageError(f"rows={wanted}: there is no row {max(wanted)}; the last one is {num_rows - 1}.")
    template, _ = checked(config, inputs)
    preparation = Preparation(preparation_options(config, identity, template, _FINGERPRINT))

    def tasks() -> Iterator[Task]:
        for index in wanted:
            for row in dataset.rows(index, index + 1):
                names, samples = config.prompt_names, range(config.generation.n)
                yield Task(row, tuple(RecordKey(row.index, name, sample) for name in names for sample in samples))

    return tasks(), preparation


def _show(
    row: Row,
    item: EncodedSample | Answer,
    config: RunConfig,
    options: PreviewOptions,
    preparation: Preparation,
    terminal: Terminal,
) -> None:
    """One prompt: its images, sizes and text."""
    facts = item.facts
    for line in _images(row, facts, config):
        terminal.line("image", line)
    if len(config.prompt_names) > 1:
        terminal.line("name", item.key.prompt_name)
    if facts.prompt is not None:
        terminal.line("prompt", facts.prompt)
    if facts.num_prompt_tokens is not None:
        images = "" if facts.num_image_tokens is None else f", {facts.num_image_tokens} of them image tokens"
        terminal.line("tokens", f"{facts.num_prompt_tokens} in the prompt{images}")
    for warning in facts.warnings:
        terminal.line("warning", warning)
    if isinstance(item, EncodedSample):
        for name, tensor in item.tensors.items():
            if tensor.dtype.kind == "f":  # images as the model gets them
                terminal.line("tensor", f"{name} {' x '.join(map(str, tensor.shape))}")
        if options.show_prompt:
            text, has_runs = exact_text(preparation.processor.tokenizer, item.tensors["input_ids"][0])
            terminal.line("exactly", text)
            if has_runs:
                terminal.line("note", "TOKEN x 64 stands for 64 of that token in a row")


def _images(row: Row, facts: PromptFacts, config: RunConfig) -> Iterator[str]:
    examples = () if row.messages else tuple(path for turn in config.prompt.examples for path in turn.images)
    names = [f"{path} (of prompt.examples)" for path in examples]
    names += [ref.path or "in the dataset" for ref in row.images]
    for number, name in enumerate(names):
        known = number < len(facts.image_width)
        yield f"{facts.image_width[number]} x {facts.image_height[number]} pixels, {name}" if known else name


def exact_text(tokenizer: Any, input_ids: Any) -> tuple[str, bool]:
    """The text of tokens, special ones included, and whether it has runs.

    A run of one special token is shown as one and its number: an image may have thousands.
    """
    text = str(tokenizer.decode(input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    special = {*tokenizer.all_special_tokens, *getattr(tokenizer, "added_tokens_encoder", {})}
    marked = sorted((token for token in map(str, special) if not token.isspace()), key=len, reverse=True)
    if not marked:
        return text, False
    runs = re.compile(f"({'|'.join(map(re.escape, marked))})\\1{{{_REPEATED - 1},}}")
    shown, num_runs = runs.subn(lambda run: f"{run[1]} x {len(run[0]) // len(run[1])} ", text)
    return shown, num_runs > 0

"""The commands: what each word behind `vlm-batch` does."""

from __future__ import annotations

from pipeline.commands.base import Command, Keys

COMMANDS = {
    command.name: command
    for command in (
        Command(
            "plan",
            "what a run will take and cost, from a look at some of its rows; writes nothing",
            Keys.ALL,
        ),
        Command(
            "preview",
            "stream the answers of a few rows to the terminal, or converse over images; writes nothing",
            Keys.ALL,
        ),
        Command("run", "the job: plan if new, resume if not", Keys.ALL),
        Command(
            "status",
            "how far a run is, from its files alone; watch=true shows it live until it is done",
            Keys.OUTPUT_DIR,
        ),
        Command(
            "audit",
            "prove that every row of the plan has exactly one record; deep=true reads the images again, too",
            Keys.OUTPUT_DIR,
        ),
        Command(
            "retry",
            "ask the error rows of a finished run once more, all or those of only=[stage or type, ...]",
            Keys.ALL,
        ),
        Command(
            "report",
            "a self-contained HTML page: pictures with answers, errors by class, lengths, throughput, who waited",
            Keys.OUTPUT_DIR,
        ),
        Command(
            "score",
            "hold answers against references: accuracy, VQA accuracy, ANLS, BLEU, CIDEr ... with intervals of 95 %",
            Keys.NONE,
        ),
        Command(
            "diff",
            "two runs, or two prompts of one, side by side: what changed, how much, and whether it is better",
            Keys.NONE,
        ),
        Command(
            "export",
            "write the answers as text files beside the images, jsonl, csv, LLaVA or OpenAI lines, tars, or to the hub",
            Keys.OUTPUT_DIR,
        ),
    )
}

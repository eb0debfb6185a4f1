"""The command line: vlm-batch COMMAND key=value ..."""

from __future__ import annotations

import atexit
import difflib
import gc
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.ending import exit_code_of, log_to_stderr
from pipeline.errors import ErrorBudgetExceeded, UsageError
from pipeline.shown import shown

if TYPE_CHECKING:
    from pipeline.compose import Composed

COMMANDS = {
    "run": "the job: plan if new, resume if not",
    "retry": "ask the error rows of a finished run once more, all or those of only=[stage or type, ...]",
    "preview": "stream the answers of a few rows to the terminal, or converse over images; writes nothing",
    "status": "how far a run is, from its files alone; watch=true shows it every 5 seconds until it is done",
    "audit": "prove that every row of the plan has exactly one record; deep=true reads the images again, too",
}
_WATCH_SECONDS = 5.0
_USAGE = """vlm-batch COMMAND [key=value ...] [--config-dir DIR] [--cfg] [--help]

Puts prompts to a vision-language model about every image of a dataset; one Parquet row for each answer.

commands
{commands}

groups of settings (vlm-batch run dataset=images --help shows the keys of a choice)
{groups}

examples
  vlm-batch run                                              the embedded demo, results in outputs/demo
  vlm-batch run dataset=images dataset.path=photos/ prompt=caption_short vlm=auto vlm.path=MODEL
  vlm-batch run experiment=ocr_pages dataset.path=scans/ vlm.path=MODEL output_dir=outputs/scans
  vlm-batch preview dataset=images dataset.path=photos/ vlm=auto vlm.path=MODEL rows=[0,5] show_prompt=true
  vlm-batch preview chat=true image=photo.jpg vlm=auto vlm.path=MODEL
  vlm-batch status output_dir=outputs/scans

exit codes: 0 done, 1 failed, 2 wrong usage or settings, 75 interrupted (run the same command again)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    if argv is None:
        atexit.register(gc.freeze)  # nothing to collect at the end: a second, after torch and transformers
    log_to_stderr()
    words = list(sys.argv[1:] if argv is None else argv)
    program = sys.orig_argv[1 : len(sys.orig_argv) - len(words)] if argv is None else ["-m", "pipeline"]
    return exit_code_of(lambda: _main(words, [sys.executable, *program, *words]))


def _main(words: list[str], command_line: Sequence[str]) -> int:
    if "--version" in words:
        print(__version__)
        return 0
    wants_help = not words or "--help" in words or "-h" in words
    config_dir = _taken(words, "--config-dir")
    names = [word for word in words if not word.startswith("-") and "=" not in word]
    if wants_help and not names:
        _print_usage(config_dir)
        return 0
    if not names:
        raise UsageError(f"no command given. Commands: {', '.join(COMMANDS)}. See vlm-batch --help.")
    command, settings = names[0], [word for word in words if word not in ("--help", "-h", "--cfg")]
    settings.remove(command)
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"there is no command {command!r}.{hint} Commands: {', '.join(COMMANDS)}.")
    call = _call(command, settings, config_dir, command_line)
    if wants_help:
        _print_keys(command, call)
        return 0
    if "--cfg" in words:
        print(call.composed().yaml, end="")
        return 0
    actions: dict[str, Callable[[_Call], int]] = {
        "run": _run,
        "retry": _run,
        "preview": _preview,
        "status": _status,
        "audit": _audit,
    }
    return actions[command](call)


@dataclass(frozen=True, slots=True)
class _Call:
    """A command line taken apart: the command's own options, and what sets keys of the configuration."""

    options: Any  # an instance of `schema`, None where the command has no words of its own
    schema: type | None
    settings: Sequence[str]
    config_dir: str | None
    command_line: Sequence[str]  # the whole of it, program first

    def composed(self) -> Composed:
        """The configuration, and how it reads as YAML."""
        from pipeline.compose import compose

        own = [entry.name for entry in fields(self.schema)] if self.schema else []
        return compose(self.settings, config_dir=self.config_dir, own=own)


def _call(command: str, words: Sequence[str], config_dir: str | None, command_line: Sequence[str]) -> _Call:
    from pipeline.compose import taken

    schema = _schema(command)
    options, settings = taken(words, schema) if schema else (None, words)
    return _Call(options, schema, settings, config_dir, command_line)


def _schema(command: str) -> type | None:
    """The options that only this command has."""
    if command == "preview":
        from pipeline.preview.options import PreviewOptions

        return PreviewOptions
    if command == "retry":
        from pipeline.agenda import RetryOptions

        return RetryOptions
    if command == "status":
        from pipeline.status import StatusOptions

        return StatusOptions
    if command == "audit":
        from pipeline.audit import AuditOptions

        return AuditOptions
    return None


def _run(call: _Call) -> int:
    from pipeline.agenda import refuse_retry
    from pipeline.cluster.base import Job
    from pipeline.manifest import write_manifest
    from pipeline.planning import Resume
    from pipeline.ranks import ranks
    from pipeline.run import prepare, run
    from pipeline.status import phases, progress_line, read_status, status_lines

    config = call.composed().config
    output_dir = config.output_path
    started = time.time()
    only = None
    if call.options is not None:
        only = call.options.only
        if config.resume is Resume.overwrite:
            raise UsageError("resume=overwrite begins anew; retry asks again what is there. Leave one of them out.")
        refuse_retry(output_dir, only)
    job = Job(
        partial(prepare, config, only),
        partial(run, config, only),
        str(output_dir),
        command=call.command_line,
        wait=config.wait,
        progress=partial(progress_line, output_dir),
    )
    if not config.cluster.launch(job):
        return 0  # a scheduler has it
    if ranks().rank:
        return 0  # what is said now is said by rank 0
    status = read_status(output_dir)
    write_manifest(output_dir, status)  # which a kill may have left undone
    fresh = [worker for worker in status.workers if worker["started"] >= started]
    if not fresh:
        done = f"All {status.plan.num_records:,} rows are done already" if only is None else "No such error row is left"
        print(f"{done}; no model was loaded.")
        if config.resume is Resume.extend:
            print("input    nothing was added to it")
        else:
            print(f"input    as listed {status.plan.created}; resume=extend takes in what was added since")
    for line in status_lines(output_dir, status):
        print(shown(line))
    for worker in fresh:
        for kind, example in worker["error_examples"].items():
            print(shown(f"example  {kind}: {example}").replace("\n", "\\n"))  # a row cannot forge a line
    if fresh:
        rows, tokens = (sum(worker[f"{what}_per_second"] for worker in fresh) for what in ("rows", "tokens"))
        together = f", {len(fresh)} workers" if len(fresh) > 1 else ""
        print(f"speed    {rows:.1f} rows/s, {tokens:.0f} tokens/s{together}")
        print(f"time     {', '.join(f'{name} {share:.0%}' for name, share in phases(fresh).items())}")
    print(shown(f"data     {output_dir / 'data'}/part-*.parquet"))
    if status.complete and 0 < status.plan.num_records == sum(status.errors.values()):
        print("failed   every row; the examples above say why" if fresh else "failed   every row")
        return 0 if config.max_error_rate is None else ErrorBudgetExceeded.exit_code
    return 0


def _preview(call: _Call) -> int:
    from pipeline.preview.command import run_preview

    return run_preview(call.composed().config, call.options)


def _status(call: _Call) -> int:
    from pipeline.status import read_status, status_lines

    output_dir = call.composed().config.output_path
    while True:
        status = read_status(output_dir)
        print(shown("\n".join(status_lines(output_dir, status))), flush=True)
        if not call.options.watch or status.complete:
            return 0
        time.sleep(_WATCH_SECONDS)
        print()


def _audit(call: _Call) -> int:
    from pipeline.audit import audit, audit_lines

    output_dir = call.composed().config.output_path
    found = audit(output_dir, call.options)
    for line in audit_lines(output_dir, found):
        print(shown(line))
    return 0 if found.passed else 1


def _taken(words: list[str], flag: str) -> str | None:
    """The value of `--flag VALUE` or `--flag=VALUE`, taken out of the words."""
    for place, word in enumerate(words):
        if word == flag:
            if place + 1 == len(words):
                raise UsageError(f"{flag} needs a folder.")
            value = words[place + 1]
            del words[place : place + 2]
            return value
        if word.startswith(flag + "="):
            del words[place]
            return word.partition("=")[2]
    return None


def _print_usage(config_dir: str | None) -> None:
    from pipeline.compose import choices

    commands = "\n".join(f"  {name:8} {doc}" for name, doc in COMMANDS.items())
    groups = "\n".join(
        textwrap.fill(", ".join(names), 118, initial_indent=f"  {group + '=':12} ", subsequent_indent=" " * 15)
        for group, names in choices(config_dir).items()
    )
    print(_USAGE.format(commands=commands, groups=groups))


def _print_keys(command: str, call: _Call) -> None:
    from pipeline.compose import described, described_options

    print(f"vlm-batch {command}: {COMMANDS[command]}\n")
    for key, value, doc in described_options(call.schema) if call.schema else ():
        print(f"  {key}={value}\n      {doc}")
    for key, value, doc in described(call.settings, config_dir=call.config_dir):
        if command in ("run", "retry", "preview") or key == "output_dir":
            print(f"  {key}={value}\n      {doc}")


if __name__ == "__main__":
    sys.exit(main())

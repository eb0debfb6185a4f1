"""The command line: vlm-batch COMMAND key=value ..."""

from __future__ import annotations

import atexit
import difflib
import gc
import sys
import textwrap
from collections.abc import Sequence

from pipeline import __version__
from pipeline.commands import COMMANDS
from pipeline.commands.base import Call, Command, Keys
from pipeline.ending import exit_code_of, log_to_stderr
from pipeline.errors import UsageError

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
    name, settings = names[0], [word for word in words if word not in ("--help", "-h", "--cfg")]
    settings.remove(name)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"there is no command {name!r}.{hint} Commands: {', '.join(COMMANDS)}.")
    command = COMMANDS[name]
    call = _call(command, settings, config_dir, command_line)
    if wants_help:
        _print_keys(command, call)
        return 0
    if "--cfg" in words:
        if command.keys is Keys.NONE:
            raise UsageError(f"{name} has no configuration to print; vlm-batch {name} --help lists its words.")
        print(call.composed().yaml, end="")
        return 0
    return command.execute(call)


def _call(command: Command, words: Sequence[str], config_dir: str | None, command_line: Sequence[str]) -> Call:
    from pipeline.compose import nothing_left, taken

    schema = command.options
    options, settings = taken(words, schema) if schema else (None, words)
    if schema and command.keys is Keys.NONE:
        nothing_left(settings, schema, command.name)
    return Call(options, schema, settings, config_dir, command_line)


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

    commands = "\n".join(f"  {command.name:8} {command.doc}" for command in COMMANDS.values())
    groups = "\n".join(
        textwrap.fill(", ".join(names), 118, initial_indent=f"  {group + '=':12} ", subsequent_indent=" " * 15)
        for group, names in choices(config_dir).items()
    )
    print(_USAGE.format(commands=commands, groups=groups))


def _print_keys(command: Command, call: Call) -> None:
    from pipeline.compose import described, described_options

    print(f"vlm-batch {command.name}: {command.doc}\n")
    for key, value, doc in described_options(call.schema) if call.schema else ():
        print(f"  {key}={value}\n      {doc}")
    if command.keys is Keys.NONE:
        return
    for key, value, doc in described(call.settings, config_dir=call.config_dir):
        if command.keys is Keys.ALL or key == "output_dir":
            print(f"  {key}={value}\n      {doc}")


if __name__ == "__main__":
    sys.exit(main())

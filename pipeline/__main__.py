"""The command line: vlm-batch COMMAND key=value ..."""

from __future__ import annotations

import difflib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from pipeline import __version__
from pipeline.errors import Interrupted, UsageError, VlmBatchError

COMMANDS = {
    "run": "the job: plan if new, resume if not",
    "status": "how far a run is, from its files alone; watch=true shows it every 5 seconds until it is done",
    "audit": "prove that every row of the plan has exactly one record",
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
  vlm-batch status output_dir=outputs/scans

exit codes: 0 done, 1 failed, 2 wrong usage or settings, 75 interrupted (run the same command again)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(words)
    except VlmBatchError as problem:
        print(f"vlm-batch: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:  # before the run listens to signals
        return Interrupted.exit_code
    except BrokenPipeError:  # vlm-batch status | head
        return 1


def _main(words: list[str]) -> int:
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
    if wants_help:
        _print_keys(command, settings, config_dir)
        return 0
    if "--cfg" in words:
        from pipeline.compose import compose

        print(compose(settings, config_dir=config_dir).yaml, end="")
        return 0
    actions: dict[str, Callable[[list[str], str | None], int]] = {"run": _run, "status": _status, "audit": _audit}
    return actions[command](settings, config_dir)


def _run(settings: list[str], config_dir: str | None) -> int:
    from pipeline.compose import compose
    from pipeline.manifest import write_manifest
    from pipeline.run import run
    from pipeline.status import read_status, status_lines

    config = compose(settings, config_dir=config_dir).config
    output_dir = config.output_path
    started = time.time()
    config.cluster.launch(partial(run, config))
    status = read_status(output_dir)
    write_manifest(output_dir, status)
    fresh = [worker for worker in status.workers if worker["started"] >= started]
    if not fresh:
        print(f"All {status.plan.num_records:,} rows are done already; no model was loaded.")
        print(f"input    as listed {status.plan.created}; what was added since needs another output_dir")
    for line in status_lines(output_dir, status):
        print(line)
    for worker in fresh:
        for kind, example in worker["error_examples"].items():
            print(f"example  {kind}: {example}")
        waited = worker["waiting_for_input_seconds"] / max(1e-9, worker["seconds"] - worker["loading_seconds"])
        print(
            f"speed    {worker['rows_per_second']:.1f} rows/s, {worker['tokens_per_second']:.0f} tokens/s, "
            f"{waited:.0%} of the time waiting for input"
        )
    if status.complete and 0 < status.plan.num_records == sum(status.errors.values()):
        print("warning  every row failed; the examples above say why")
    print(f"data     {output_dir / 'data'}/part-*.parquet")
    return 0


def _status(settings: list[str], config_dir: str | None) -> int:
    from pipeline.compose import compose
    from pipeline.status import read_status, status_lines

    watch = _switch(settings, "watch")
    output_dir = compose(settings, config_dir=config_dir).config.output_path
    while True:
        status = read_status(output_dir)
        print("\n".join(status_lines(output_dir, status)), flush=True)
        if not watch or status.complete:
            return 0
        time.sleep(_WATCH_SECONDS)
        print()


def _audit(settings: list[str], config_dir: str | None) -> int:
    from pipeline.audit import audit, audit_lines
    from pipeline.compose import compose

    output_dir = compose(settings, config_dir=config_dir).config.output_path
    found = audit(output_dir)
    for line in audit_lines(output_dir, found):
        print(line)
    return 0 if found.passed else 1


def _switch(words: list[str], name: str) -> bool:
    """The value of `name=true|false`, taken out of the words."""
    found = [word for word in words if word.startswith(f"{name}=")]
    for word in found:
        words.remove(word)
        if word.partition("=")[2] not in ("true", "false"):
            raise UsageError(f"{word}: expected {name}=true or {name}=false.")
    return bool(found) and found[-1].endswith("=true")


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
    groups = "\n".join(f"  {group + '=':12} {', '.join(names)}" for group, names in choices(config_dir).items())
    print(_USAGE.format(commands=commands, groups=groups))


def _print_keys(command: str, settings: list[str], config_dir: str | None) -> None:
    from pipeline.compose import described

    print(f"vlm-batch {command}: {COMMANDS[command]}\n")
    for key, value, doc in described(settings, config_dir=config_dir):
        if command == "run" or key == "output_dir":
            print(f"  {key}={value}\n      {doc}")


if __name__ == "__main__":
    sys.exit(main())

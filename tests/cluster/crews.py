"""Work for crews, in a module of its own: the processes of a crew import it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from pipeline.errors import Interrupted, RunFailed, UsageError


def note(folder: Path, rank: int, word: str) -> int:
    """Write a word down; how often this rank has written it by now."""
    with open(folder / f"{rank}.{word}", "a") as file:
        file.write("x")
        return file.tell()


def tells(folder: Path, rank: int, world: int) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    (folder / f"{rank}.told").write_text(" ".join(os.environ.get(name, "-") for name in names) + f" {rank}/{world}")


def is_killed_once(folder: Path, rank: int, world: int) -> None:
    if rank == 0 and note(folder, rank, "started") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while not (folder / "0.started").exists() or (folder / "0.started").stat().st_size < 2:
        time.sleep(0.02)


def always_killed(folder: Path, rank: int, world: int) -> None:
    note(folder, rank, "started")
    os.kill(os.getpid(), signal.SIGKILL)


def one_fails(folder: Path, rank: int, world: int) -> None:
    if rank == 1:
        raise RunFailed("the disk of rank 1 is full")


def all_fail(folder: Path, rank: int, world: int) -> None:
    raise RunFailed(f"the disk of rank {rank} is full") if rank else UsageError("no such key")


def all_misused(folder: Path, rank: int, world: int) -> None:
    raise UsageError("no such key")


def has_a_bug(folder: Path, rank: int, world: int) -> None:
    raise ZeroDivisionError("a bug")


def waits(folder: Path, rank: int, world: int) -> None:
    """Until a signal; then ends as a run does."""

    def stop(*_: object) -> None:
        if note(folder, rank, "signals") == 1:  # another may come from whoever passes them on
            raise Interrupted("stopped")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    note(folder, rank, "started")
    try:
        for _ in range(600):  # a signal may be delivered to another thread, which wakes no sleeper
            time.sleep(0.1)
    finally:
        note(folder, rank, "stopped")


def stops_slowly(folder: Path, rank: int, world: int) -> None:
    """As waits(), but with something in flight that takes a while."""
    try:
        waits(folder, rank, world)
    finally:
        time.sleep(1)


def hangs(folder: Path, rank: int, world: int) -> None:
    """Whatever signal comes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    note(folder, rank, "started")
    time.sleep(60)


if __name__ == "__main__":
    from functools import partial

    from pipeline.cluster.crew import Crew
    from pipeline.ending import exit_code_of, log_to_stderr

    log_to_stderr()
    work = partial(globals()[sys.argv[1]], Path(sys.argv[2]))
    sys.exit(exit_code_of(lambda: Crew(work, 2, []).run() or 0))

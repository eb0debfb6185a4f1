"""The Slurm of scripts/slurm_node.sh, and what tests ask of it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable

import pytest
from command_line import CHECKOUT

from pipeline.cluster.slurm_queue import Member, members_listed

_NODE = [str(CHECKOUT / "scripts" / "slurm_node.sh"), "status"]
needs_slurm = pytest.mark.skipif(
    subprocess.run(_NODE, capture_output=True).returncode != 0,
    reason="needs a Slurm for tests: scripts/slurm_node.sh start",
)


def ask(*words: str) -> str:
    """What a command of Slurm prints."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def job_of(printed: str) -> str:
    """The number of the job that vlm-batch has submitted."""
    found = re.search(r"^slurm +job (\d+), ", printed, re.MULTILINE)
    assert found, printed
    return found[1]


def members(job_id: str) -> dict[str, Member]:
    """What every member of a job is at; Slurm forgets one that was cancelled before it began."""
    listing = ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={job_id}", "--format=%i|%T|%r")
    return dict(members_listed(listing))


def states(job_id: str) -> dict[str, str]:
    """The same, but the names of the states alone."""
    return {name: member.state for name, member in members(job_id).items()}


def num_restarts(member: str) -> int:
    """How often a member was queued again."""
    found = re.search(r"Restarts=(\d+)", ask("scontrol", "show", "job", member))
    assert found
    return int(found[1])


def wait_until(true: Callable[[], bool], what: str, seconds: float = 240) -> None:
    """Look until it is true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.5)


def wait_until_all(job_id: str, *wanted: str) -> None:
    """Until every member of a job is in one of these states; none may have ended in another."""

    def there() -> bool:
        found = members(job_id)
        lost = {name: member.state for name, member in found.items() if member.ended and member.state not in wanted}
        assert not lost, lost
        return all(member.state in wanted for member in found.values())

    wait_until(there, f"{wanted} of job {job_id}")

"""What Slurm says of an array job, and what it is asked to do: squeue, scancel, scontrol. No accounting is needed."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
_FORGOTTEN = "ended"  # Slurm forgets a job some minutes after its end
_WAITS = "PENDING"
_TIMEOUT_SECONDS = 60.0


@dataclass(slots=True)
class Member:
    """One task of an array job, as it was seen last."""

    state: str
    reason: str = ""

    @property
    def ended(self) -> bool:
        return self.state in _ENDED or self.state == _FORGOTTEN


class QueuedArray:
    """An array job that was submitted: its members 0 to num_members - 1."""

    def __init__(self, job_id: str, num_members: int) -> None:
        self.job_id = job_id
        self.members = {f"{job_id}_{number}": Member(_WAITS) for number in range(num_members)}
        self._was_silent = False

    @property
    def ended(self) -> bool:
        """Whether no member will do anything any more."""
        return all(member.ended for member in self.members.values())

    @property
    def completed(self) -> bool:
        """Whether a member has ended in good order."""
        return any(member.state == "COMPLETED" for member in self.members.values())

    def look(self) -> None:
        """Ask the queue. What cannot be asked now is as it was; that is said once."""
        asked = _called(
            ["squeue", "--noheader", "--array", "--states=all", f"--jobs={self.job_id}", "--format=%i|%T|%r"]
        )
        if asked.returncode and "invalid job id" not in asked.stderr.lower():
            if not self._was_silent:
                log.warning("squeue cannot be asked now (%s); asking again", asked.stderr.strip())
            self._was_silent = True
            return
        self._was_silent = False
        found = dict(members_listed(asked.stdout))
        for name, member in self.members.items():
            if name in found:
                self.members[name] = found[name]
            elif not member.ended:
                self.members[name] = Member(_FORGOTTEN)

    def states(self) -> str:
        """How many members are in which state, and why those that wait do."""
        counts: dict[str, int] = {}
        for member in self.members.values():
            waits = f" ({member.reason})" if member.state == _WAITS and member.reason not in ("", "None") else ""
            name = member.state.lower() + waits
            counts[name] = counts.get(name, 0) + 1
        return ", ".join(f"{number} {state}" for state, number in counts.items())

    def cancel_waiting(self) -> None:
        """Take those that have not begun out of the queue."""
        if any(member.state == _WAITS for member in self.members.values()):
            _called(["scancel", f"--state={_WAITS}", self.job_id])


def members_listed(listing: str) -> list[tuple[str, Member]]:
    """The members in what squeue prints, by their names (JOB_NUMBER)."""
    lines = (line.strip().split("|") for line in listing.splitlines())
    return [(fields[0], Member(fields[1], fields[2])) for fields in lines if len(fields) == 3]


def requeue(member: str) -> str:
    """Put a running member (JOB_NUMBER: SLURM_JOB_ID names another one, or all) into the queue again.

    Returns:
        what Slurm objects to; empty if nothing.
    """
    asked = _called(["scontrol", "requeue", member])
    return (asked.stderr.strip() or f"exit code {asked.returncode}") if asked.returncode else ""


def _called(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A command of Slurm to its end; one that cannot be started, or does not answer, has failed."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as problem:
        return subprocess.CompletedProcess(words, 1, "", str(problem))

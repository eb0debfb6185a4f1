"""Slurm: an array job whose members are workers, each of which may be sent away and begin again.

A member is this run's own command line, started again on another host by the submitted script. Nothing is pickled: the
script is kept by Slurm from its submission on, so that a member that is queued again needs no file but the output
folder, and nothing that is read from a folder is run.

The member is the batch script itself, without srun. So the warning before the time limit (--signal=B:USR1@...) reaches
it alone, and where a job of higher priority sends it away, it hears of that when Slurm does queue it again: of a job
step that ends within the grace time, Slurm believes that it has failed (seen with 22.05), and queues nothing.

In the member a process looks after the one that works (see Crew), and outlives it, however that ends. It queues the
member again after exit code 75, unless SIGTERM came: then Slurm ends the job, and knows whether it is to come back.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.cluster.base import ClusterConfig, Job
from pipeline.cluster.crew import Crew
from pipeline.cluster.slurm_queue import QueuedArray, requeue
from pipeline.errors import Interrupted, RunFailed, UsageError
from pipeline.option import option
from pipeline.ranks import Ranks
from pipeline.redaction import without_credentials
from pipeline.shown import shown

log = logging.getLogger(__name__)

_MEMBER_OF = "VLM_BATCH_MEMBER_OF"  # the array job, in the environment of its members
_SECRET_WORD = "VLM_BATCH_WORD"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LOOK_SECONDS = 3.0
_LINE_SECONDS = 30.0
_MOST_NAMED = 8  # members, in a message
_MOST_LOG_LINES = 12
# What members rely on: not to be set by cluster.extra.
_FIXED = {
    "array", "error", "job-name", "nodes", "no-requeue", "ntasks", "open-mode", "output", "requeue", "signal", "wrap",
}  # fmt: skip
_OWN = {"partition", "account", "constraint", "qos", "time", "mem", "gres", "cpus-per-task"}


@dataclass(kw_only=True, slots=True)
class SlurmConfig(ClusterConfig):
    """An array job of Slurm."""

    kind: ClassVar[str] = "slurm"

    workers: int = option(2, "members of the array, each of them one worker", speed=True, least=1)
    partition: str | None = option(None, "where to queue; null = Slurm's default", speed=True)
    account: str | None = option(None, "who is charged; null = Slurm's default", speed=True)
    constraint: str | None = option(None, "what the hosts must have, as a100|h100", speed=True)
    qos: str | None = option(None, "quality of service; null = Slurm's default", speed=True)
    time: str | None = option(
        None, "the longest that a member runs at a time: minutes, HH:MM:SS or D-HH; null = Slurm's default", speed=True
    )
    gpus: str | None = option(None, "GPUs of a member, as 1 or a100:1; null = none", speed=True)
    cpus: int | None = option(None, "CPUs of a member; null = Slurm's default", speed=True, least=1)
    mem: str | None = option(None, "memory of a member, as 64G; null = Slurm's default", speed=True)
    setup: list[str] = option(doc="lines of shell before a member starts: module load ...", speed=True, factory=list)
    max_running: int | None = option(None, "members that run at a time; null = all", speed=True, least=1)
    signal_seconds: int = option(
        120, "seconds before the time limit when a member stops and is queued again", speed=True, least=1
    )
    max_requeues: int = option(
        100, "how often a member that was stopped is queued again; ends what gets nowhere", speed=True, least=0
    )
    folder: str | None = option(
        None, "scripts and logs, in a folder that all hosts see; null = slurm/ in output_dir", speed=True
    )
    extra: dict[str, Any] = option(
        doc="further options of sbatch by name, as extra.exclude=node7", speed=True, factory=dict
    )

    def launch(self, job: Job) -> bool:
        """See ClusterConfig.

        Raises:
            UsageError: there is no Slurm here, or it refuses the job.
        """
        if is_member():
            self._take_part(job)
            return True
        folder = self.log_folder(job.output_dir)
        refuse_absent()
        options = self.sbatch_options(job.output_dir, folder)
        if not job.prepare():
            return True  # as any run that is done
        array = QueuedArray(submit(job.command, options, self.setup, folder), self.workers)
        logs = folder / f"{array.job_id}_*.log"
        for line in (
            f"slurm    job {array.job_id}, {self.workers} members",
            f"status   vlm-batch status output_dir={shlex.quote(job.output_dir)}",
            f"queue    squeue --jobs={array.job_id}",
            f"logs     {logs}",
            f"cancel   scancel {array.job_id}",
        ):
            print(shown(line), flush=True)
        if job.wait:
            follow(job, array, folder)
        return job.wait

    def log_folder(self, output_dir: str) -> Path:
        """Where scripts and logs are.

        Raises:
            UsageError: there is no such place.
        """
        if self.folder is None and "://" in output_dir:
            raise UsageError(
                f"cluster.folder is not set, and output_dir={output_dir} is not a folder that Slurm could write logs "
                "to. Set cluster.folder to one that all hosts see."
            )
        folder = Path(self.folder or f"{output_dir}/slurm").expanduser().absolute()
        if "%" in str(folder):
            raise UsageError(f"cluster.folder={folder}: expected a name without %, to which Slurm gives a meaning.")
        return folder

    def sbatch_options(self, output_dir: str, folder: Path) -> dict[str, Any]:
        """What the array job is submitted with, by the long names of sbatch's options; True for one without a value.

        Raises:
            UsageError: a value cannot be written into a script, or `extra` sets what it must not.
        """
        throttle = f"%{self.max_running}" if self.max_running else ""
        name = re.sub(r"[^\w.-]+", "-", output_dir.rstrip("/").rpartition("/")[2])
        own: dict[str, Any] = {
            "array": f"0-{self.workers - 1}{throttle}",
            "job_name": f"vlm-batch-{name}",  # as submitit calls it, which would add a name of its own
            "nodes": 1,
            "ntasks": 1,
            "signal": f"B:USR1@{self.signal_seconds}",
            "requeue": True,
            "open-mode": "append",  # a member that begins again goes on with its log
            "output": f"{folder}/%A_%a.log",
            "partition": self.partition,
            "account": self.account,
            "constraint": self.constraint,
            "qos": self.qos,
            "time": self.time,
            "gres": self.gpus and f"gpu:{self.gpus}",
            "cpus-per-task": self.cpus,
            "mem": self.mem,
        }
        more = {key.replace("_", "-"): value for key, value in self.extra.items()}
        if refused := sorted(more.keys() & (_FIXED | _OWN)):
            raise UsageError(
                f"cluster.extra.{refused[0]}: this option of sbatch is set by the program, or has a key of its own "
                "(vlm-batch run cluster=slurm --help)."
            )
        found = {key: value for key, value in (own | more).items() if value is not None and value is not False}
        for key, value in found.items():
            if not str(value).isprintable():
                raise UsageError(f"sbatch --{key}={value!r}: expected one line of text.")
        return found

    def _take_part(self, job: Job) -> None:
        """What a member does."""
        member = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        own = Ranks(int(os.environ["SLURM_ARRAY_TASK_ID"]), self.workers, 0, 1)
        os.environ.update(own.environment)
        for number in _SIGNALS:  # before the crew listens and after: what comes then changes nothing
            signal.signal(number, signal.SIG_IGN)
        crew = Crew(job.work, 1, [], first=own.rank, world=own.world)
        try:
            crew.run()
        except Interrupted as end:
            if signal.SIGTERM in crew.signals:
                raise
            num_requeues = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            if num_requeues >= self.max_requeues:
                raise RunFailed(
                    f"{member} was stopped before the work was done, and has begun again {num_requeues} times already: "
                    "as often as cluster.max_requeues says. The same command goes on."
                ) from end
            if objection := requeue(member):
                raise Interrupted(
                    f"{member} was stopped and could not be queued again ({objection}). Run the same command again to "
                    "go on."
                ) from end
            raise Interrupted(f"{member} is in the queue again; what is finished is on disk.") from end
        log.info("%s: all is done", member)


def is_member(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started by a script of ours, in an array job of Slurm."""
    return bool(environment.get(_MEMBER_OF)) and environment[_MEMBER_OF] == environment.get("SLURM_ARRAY_JOB_ID")


def refuse_absent() -> None:
    """Refuse to go on where jobs cannot be submitted.

    Raises:
        UsageError: submitit is not installed, or Slurm is not here.
    """
    try:
        import submitit  # noqa: F401
    except ImportError as problem:
        raise UsageError(
            "cluster=slurm needs the package submitit, which is not installed: pip install 'vlm-batch[slurm]'."
        ) from problem
    if missing := [name for name in ("sbatch", "srun", "squeue", "scancel") if shutil.which(name) is None]:
        raise UsageError(
            f"cluster=slurm: there is no {missing[0]} here. Run it where jobs are submitted, as on a login node; "
            "cluster=local and cluster=gpus need no Slurm."
        )


def submit(command: Sequence[str], options: Mapping[str, Any], setup: Sequence[str], folder: Path) -> str:
    """Submit the script of the members; the number of the job.

    Raises:
        UsageError: sbatch refuses it, or the folder cannot be written.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    words, secrets = script_words(command)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        executor = SlurmExecutor(folder)
        executor.update_parameters(
            additional_parameters=dict(options),
            # A warning that comes before the program listens must not end it.
            setup=[*setup, 'trap "" USR1', f'export {_MEMBER_OF}="$SLURM_ARRAY_JOB_ID"'],
            use_srun=False,
            stderr_to_stdout=True,
            time=None,
            wckey=None,
        )
        os.environ.update(secrets)  # sbatch hands the environment on, and no file has it
        # Not submit(), which would write pickles: the words are all that a member needs. exec: signals for the script
        # are for the program.
        return str(executor._submit_command(f"exec {' '.join(words)}").job_id)
    except (FailedJobError, FailedSubmissionError) as problem:
        raise UsageError(
            f"sbatch refuses the job: {str(problem).strip()}. The keys cluster.* are its options "
            "(vlm-batch run cluster=slurm --help)."
        ) from problem
    except OSError as problem:
        raise UsageError(
            f"{folder} cannot be written: {problem}. Set cluster.folder to one that all hosts see."
        ) from problem
    finally:
        for name in secrets:
            os.environ.pop(name, None)


def script_words(command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A command as words of a shell script, and the variables that they take the place of: those with a password."""
    words: list[str] = []
    secrets: dict[str, str] = {}
    for number, word in enumerate(command):
        if without_credentials(word) == word:
            words.append(shlex.quote(word))
            continue
        name = f"{_SECRET_WORD}_{number}"
        secrets[name] = word
        words.append(f'"${{{name}:?the environment of sbatch is needed here}}"')
    return words, secrets


def follow(job: Job, array: QueuedArray, folder: Path) -> None:
    """Say how far the job is until all is done.

    Raises:
        Interrupted: somebody stops waiting.
        RunFailed: no member is left, and rows are missing.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    said, said_at = "", 0.0
    try:
        while True:
            array.look()
            if array.completed:
                array.cancel_waiting()  # they would find nothing to do
            if array.ended:
                break
            if time.monotonic() - said_at > _LINE_SECONDS:
                line = f"{array.job_id}: {array.states()}; {job.progress()}"
                if line != said:
                    print(shown(line), flush=True)
                said, said_at = line, time.monotonic()
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        raise Interrupted(
            f"Nobody waits any more; job {array.job_id} goes on. 'scancel {array.job_id}' ends it, 'vlm-batch status "
            "output_dir=... watch=true' shows how far it is."
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    if not array.completed and job.prepare():
        raise RunFailed(_what_happened(array, folder))


def _what_happened(array: QueuedArray, folder: Path) -> str:
    failed = {name: member for name, member in array.members.items() if member.state != "COMPLETED"}
    ends = [f"{name} {member.state}" for name, member in failed.items()]
    if len(ends) > _MOST_NAMED:
        ends[_MOST_NAMED:] = [f"{len(ends) - _MOST_NAMED} more"]
    # One that failed by itself knows more than one that was cancelled.
    by_itself = sorted(failed, key=lambda name: failed[name].state in ("CANCELLED", "PREEMPTED", "TIMEOUT"))
    logs = [path for name in by_itself if (path := folder / f"{name}.log").exists()]
    text = f"job {array.job_id} has ended, and rows are missing: {', '.join(ends)}. The same command goes on."
    if not logs:
        return f"{text} There is no log in {folder}: no member has begun, or that folder is not seen by their hosts."
    lines = logs[0].read_text(encoding="utf-8", errors="replace").splitlines()[-_MOST_LOG_LINES:]
    named = ", ".join(map(str, logs[:_MOST_NAMED]))
    return f"{text} Logs: {named}\nThe end of {logs[0].name}:\n" + "\n".join(f"  {line}" for line in lines)

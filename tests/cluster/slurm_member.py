"""What a member of an array job runs, with work of a test: slurm_member.py WORK FOLDER."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import crews

from pipeline.cluster.base import Job
from pipeline.cluster.slurm import SlurmConfig
from pipeline.ending import exit_code_of, log_to_stderr

if __name__ == "__main__":
    work = partial(getattr(crews, sys.argv[1]), Path(sys.argv[2]))
    log_to_stderr()
    job = Job(lambda: True, work, sys.argv[2])
    sys.exit(exit_code_of(lambda: 0 if SlurmConfig(workers=3, max_requeues=4).launch(job) else 9))

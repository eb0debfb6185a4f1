"""What vLLM calls in each process that it starts (its entry point `vllm.general_plugins`): here, on behalf of a run.

vLLM's processes outlive a parent that is killed, and hold the accelerator's memory: the run could not start again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

RUN_PROCESS = "VLM_BATCH_VLLM_PARENT"  # environment variable: the process that runs vLLM for us
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def end_with_parent() -> None:
    """Let the kernel end this process with its parent (Linux). In a vLLM that is not ours, nothing."""
    run_process = os.environ.get(RUN_PROCESS)
    if run_process is None or int(run_process) == os.getpid() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() == 1 and run_process != "1":  # it is gone already
        os.kill(os.getpid(), signal.SIGKILL)

"""Signals to a process that does not come to an end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

_STUCK = """
import time
from pipeline.interruption import Interruption
with Interruption(600) as stop:
    print("ready", flush=True)
    while True:
        time.sleep(60)
"""


def test_the_third_ctrl_c_ends_a_run_at_once() -> None:
    """Fault 7: the second changes nothing, nor does a SIGTERM; the third is exit code 75, whatever the run is at."""
    process = subprocess.Popen([sys.executable, "-c", _STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.2)  # two of one kind that wait are one
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert said.count(b"stopping, within 600 s") == 1

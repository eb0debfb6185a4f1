"""`vlm-batch` by a clock that other programs do not disturb: the time that this process computes.

On a machine that others use as well, the same job takes twice as long at one moment as at another, and neither its
forecast nor anything else says so beforehand. What a forecast is made of can still be held to what a run takes.
"""

from __future__ import annotations

import sys
import time

time.perf_counter = time.process_time
time.monotonic = time.process_time

from pipeline.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

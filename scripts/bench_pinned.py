"""`vlm-batch run` with each rank on one core, with all its processes: python scripts/bench_pinned.py KEY=VALUE ...

For scripts/bench_cluster.py. Everything else is the program's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from pipeline.cluster.base import Job
from pipeline.compose import compose
from pipeline.ending import exit_code_of, log_to_stderr
from pipeline.run import prepare, run


def on_one_core(work: Callable[[int, int], None], cores: Sequence[int], rank: int, world: int) -> None:
    """What a rank does, on the core that is its own; threads and processes that it starts stay there."""
    for thread in os.listdir("/proc/self/task"):  # libraries have begun some
        os.sched_setaffinity(int(thread), {cores[rank % len(cores)]})
    work(rank, world)


def main(words: Sequence[str]) -> int:
    config = compose(words).config
    work = partial(on_one_core, partial(run, config, None), sorted(os.sched_getaffinity(0)))
    config.cluster.launch(Job(partial(prepare, config, None), work, str(config.output_path)))
    return 0


if __name__ == "__main__":
    log_to_stderr()
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))

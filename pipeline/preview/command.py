"""vlm-batch preview: which of its three ways was asked for."""

from __future__ import annotations

import errno
import gc
import sys
from io import TextIOWrapper

from pipeline.config import RunConfig
from pipeline.errors import Interrupted, RunFailed, UsageError
from pipeline.preview.options import PreviewOptions

# The collector looks at every new object of the 3,000 modules that come with torch and transformers, again and again.
# Looking less often brings the first token of the demo model after 3.9 s instead of 4.7 s (two cores).
_COLLECT_EVERY = 50_000


def run_preview(config: RunConfig, options: PreviewOptions) -> int:
    """Preview rows, render prompts or converse, on standard output and input; the exit code.

    Raises:
        UsageError: words that contradict each other, or settings that cannot work.
        RunFailed: the model cannot be loaded.
        Interrupted: Ctrl-C.
    """
    options.check()
    if sys.stdout is None or (options.chat and sys.stdin is None):
        raise UsageError("preview needs its standard output, and chat=true its standard input; one is closed.")
    gc.set_threshold(_COLLECT_EVERY)
    try:
        return _previewed(config, options)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # below what was begun
        raise Interrupted("Stopped; nothing was written.") from None
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EIO):
            raise
        raise RunFailed(f"standard output cannot be written: {problem}.") from problem


def _previewed(config: RunConfig, options: PreviewOptions) -> int:
    if options.render_only:
        from pipeline.preview.render import render

        return render(config, options, sys.stdout)
    from pipeline.preview.terminal import Terminal

    terminal = Terminal(sys.stdout)
    if options.chat:
        from pipeline.preview.chat import chat

        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a wrong byte in a turn must not end the conversation
        return chat(config, options, terminal, sys.stdin)
    from pipeline.preview.rows import preview

    return preview(config, options, terminal)

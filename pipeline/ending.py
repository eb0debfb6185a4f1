"""How a process of ours speaks and ends: log lines on stderr, and a problem as a sentence and an exit code."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable

from pipeline.errors import Interrupted, VlmBatchError
from pipeline.shown import shown


def log_to_stderr(*, level: int = logging.INFO, prefix: str = "") -> None:
    """Have log lines written, as they may be shown. prefix: before each, to tell processes apart."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Shown(prefix + "%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    for library in ("aiobotocore", "botocore", "httpx2"):  # which tell where they found credentials, or every request
        logging.getLogger(library).setLevel(logging.WARNING)


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def exit_code_of(action: Callable[[], int], *, name: str = "vlm-batch") -> int:
    """What the action returns, or the exit code of what it raises, which is said on stderr. name: who says it."""
    try:
        return action()
    except VlmBatchError as problem:
        sys.stderr.write(shown(f"{name}: {problem}\n"))  # in one piece: others may speak at the same moment
        return problem.exit_code
    except KeyboardInterrupt:  # before the run listens to signals
        return Interrupted.exit_code
    except BrokenPipeError:  # vlm-batch status | head
        return 1
    except Exception:  # a bug, ours or a library's; what its messages quote is no safer than what ours do
        sys.stderr.write(shown(traceback.format_exc()))
        return 1

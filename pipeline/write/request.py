"""A request to an object store: what its client raises becomes an OSError, and another try is made where that helps."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Read = TypeVar("Read")

# Before each try after the first: a store that says "slow down" (503), a conflict of two puts (409), a lost reply.
_WAITS_SECONDS = (0.1, 0.4, 1.0, 2.5, 6.0, 15.0)
# What will be the same at the next try, and what is an answer rather than a failure.
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_KINDS: dict[int, type[OSError]] = {403: PermissionError, 404: FileNotFoundError, 412: FileExistsError}


def pauses() -> Iterator[bool]:
    """Each next() takes a while and is True: time for another try; it ends when enough were made."""
    for seconds in _WAITS_SECONDS:
        time.sleep(seconds * random.uniform(0.5, 1.5))
        yield True


def persistently(action: Callable[[], Read]) -> Read:
    """The action's result, after as many tries as it takes a store that is slow or away for some seconds."""
    waiting = pauses()
    while True:
        try:
            return translated(action)
        except FINAL:
            raise
        except OSError:
            if not next(waiting, False):
                raise


def translated(action: Callable[[], Read]) -> Read:
    """The action's result; what a client library raises of its own becomes the OSError that it means."""
    try:
        return action()
    except FINAL:
        raise
    except OSError as problem:  # s3fs says "invalid argument" of a condition that does not hold
        if kind := _KINDS.get(_status_code(problem.__cause__) or 0):
            raise kind(str(problem)) from problem
        raise
    except (AssertionError, TypeError, AttributeError, KeyError):  # ours
        raise
    except Exception as problem:  # botocore, aiohttp, google.api_core: each has a family of its own
        kind = _KINDS.get(_status_code(problem) or 0)
        said = f"{type(problem).__name__}: {problem}"
        raise (kind(said) if kind else OSError(errno.EIO, said)) from problem


def _status_code(problem: BaseException | None) -> int | None:
    response = getattr(problem, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return int(found) if found is not None else None
    code = getattr(problem, "code", None)
    return code if isinstance(code, int) else None

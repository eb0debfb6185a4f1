"""How many records ended how."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.records import Answer

_MAX_EXAMPLE_CHARACTERS = 300
_NUM_NEWEST = 5


@dataclass(slots=True)
class Tally:
    """Records of a run by how they ended. `resumed` ones were finished by an earlier start."""

    num_records: int  # of the plan
    num_resumed: int = 0
    num_done: int = 0  # resumed ones included
    num_generated_tokens: int = 0  # by this start
    num_failed: int = 0  # error records, by this start
    errors: Counter[str] = field(default_factory=Counter)  # "stage/type" -> records, resumed ones included
    examples: dict[str, str] = field(default_factory=dict)  # "stage/type" -> id and message of this start's first
    newest_errors: deque[tuple[float, str, str]] = field(default_factory=lambda: deque(maxlen=_NUM_NEWEST))
    # of this start: time, "stage/type", id and message

    @property
    def num_errors(self) -> int:
        return self.errors.total()

    @property
    def num_answered(self) -> int:
        """Records that this start finished."""
        return self.num_done - self.num_resumed

    def resume(self, num_records: int, errors: Mapping[str, int]) -> None:
        self.num_resumed += num_records
        self.num_done += num_records
        self.errors.update(errors)

    def add(self, answer: Answer) -> None:
        self.num_done += 1
        self.num_generated_tokens += answer.num_generated_tokens or 0
        if answer.fault is not None:
            self.num_failed += 1
            error = f"{answer.fault.stage}/{answer.fault.kind}"
            self.errors[error] += 1
            message = answer.fault.message
            # Of an image file mostly with its path, which says more than the id.
            named = message if f"/{answer.id}:" in f"/{message}" else f"{answer.id}: {message}"
            self.examples.setdefault(error, named[:_MAX_EXAMPLE_CHARACTERS])
            self.newest_errors.append((time.time(), error, named[:_MAX_EXAMPLE_CHARACTERS]))

"""An exception where nobody expects one: the run fails, and what it leaves is as after a kill."""

from __future__ import annotations

import sys
from pathlib import Path

import faultbox
import pytest
from faultbox import Box, Found

RAISING = """
import fake_model
answers = fake_model.FakeEngine.answers

def raising(self, samples):
    for number, answer in enumerate(answers(self, samples)):
        if number == {number}:
            raise RuntimeError("a kernel failed")
        yield answer

fake_model.FakeEngine.answers = raising
fake_model.start()
"""


@pytest.mark.parametrize("number", [50, pytest.param(0, marks=pytest.mark.torture)])
def test_an_exception_of_the_engine(number: int, tmp_path: Path, found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 4: an exception in the middle of a shard: no short shard is published, and no finished answer is lost."""
    box = Box(tmp_path / "box", 120, shard_rows=40)
    with monkeypatch.context() as patched:
        patched.setattr(faultbox, "PROGRAM", [sys.executable, "-c", RAISING.format(number=number)])
        assert "RuntimeError: a kernel failed" in box.run(code=1)
    found.num_faults += 1
    box.check_always()  # as many rows as planned in every shard that is there
    assert len(list((box.output / "data").iterdir())) == (1 if number else 0)
    box.finish(found)
    assert found.num_redone <= 3, "more than the batch in which it happened"

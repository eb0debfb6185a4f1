"""What a worker counts, and the errors that it shows."""

from __future__ import annotations

import pytest

from pipeline.records import Answer, Fault, RecordKey, Stage
from pipeline.tally import Tally


@pytest.mark.parametrize(
    ("row_id", "message", "shown"),
    [
        ("a/b.png", "/photos/a/b.png: empty, 0 bytes", "/photos/a/b.png: empty, 0 bytes"),
        ("b.png", "b.png: empty", "b.png: empty"),
        ("b.png", "/photos/ab.png: empty", "b.png: /photos/ab.png: empty"),
        ("0", "rows.jsonl row 0: no image", "0: rows.jsonl row 0: no image"),
        ("x", "no message", "x: no message"),
    ],
)
def test_an_example_of_an_error_names_its_row_once(row_id: str, message: str, shown: str) -> None:
    tally = Tally(3)
    for number, text in enumerate((message, "another")):
        fault = Fault(Stage.DECODE, "OSError", text)
        tally.add(Answer(RecordKey(number, "default", 0), row_id, fault=fault))
    assert tally.examples == {"decode/OSError": shown}
    assert tally.errors == {"decode/OSError": 2}


def test_the_newest_errors_are_kept_and_no_more() -> None:
    tally = Tally(20)
    for number in range(8):
        fault = Fault(Stage.DECODE, "OSError", "x" * 1000) if number else None
        tally.add(Answer(RecordKey(number, "default", 0), f"row {number}", fault=fault))
    times, kinds, texts = zip(*tally.newest_errors, strict=True)
    assert list(times) == sorted(times) and set(kinds) == {"decode/OSError"}
    assert [text.partition(":")[0] for text in texts] == [f"row {number}" for number in range(3, 8)]
    assert all(len(text) == 300 for text in texts)

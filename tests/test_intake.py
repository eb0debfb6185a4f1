"""What the engine takes: samples in order, errors set aside, and a look ahead that takes nothing away."""

from __future__ import annotations

import numpy as np

from pipeline.intake import Intake
from pipeline.preparation import Task
from pipeline.records import Answer, EncodedSample, Fault, PromptFacts, RecordKey, Row, Stage
from pipeline.tensors.pool import Lost


def sample(row_index: int, prompt_name: str = "default") -> EncodedSample:
    key = RecordKey(row_index, prompt_name, 0)
    return EncodedSample(key, f"row {row_index}", {"input_ids": np.ones((1, 3), np.int64)}, PromptFacts())


def error(row_index: int) -> Answer:
    return Answer(RecordKey(row_index, "default", 0), f"row {row_index}", fault=Fault(Stage.DECODE, "Broken", "broken"))


def test_samples_come_in_order_and_errors_go_to_the_record() -> None:
    recorded: list[Answer] = []
    lost = Lost(Task(Row(3, "row 3", (), {}), (RecordKey(3, "default", 0),)), "took too long", "WorkerTimeout")
    given = [sample(0), sample(0, "second"), sample(2)]
    intake = Intake(iter([[given[0], given[1]], [error(1)], lost, [given[2]]]), recorded.append)
    assert list(intake) == given
    assert [(answer.id, answer.fault.kind) for answer in recorded if answer.fault] == [
        ("row 1", "Broken"),
        ("row 3", "WorkerTimeout"),
    ]


def test_a_look_at_the_first_samples_takes_nothing_away() -> None:
    given = [sample(number) for number in range(3)]
    intake = Intake(iter([[one] for one in given]), [].append)
    assert intake.first(2) == given[:2]
    assert intake.first(0) == []
    assert intake.first(5) == given
    assert list(intake) == given


def test_what_is_left_of_a_result_is_ready_whatever_the_workers_say() -> None:
    intake = Intake(iter([[sample(0), sample(0, "second")]]), [].append, lambda: False)
    assert not intake.ready
    next(intake)
    assert intake.ready
    next(intake)
    assert not intake.ready

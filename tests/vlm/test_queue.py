"""The queue before the slots: what is read together, what begins alike, and what waits for more."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.records import EncodedSample, PromptFacts, RecordKey
from pipeline.tensors.batch import Batcher
from pipeline.vlm.slots.queue import Queue, SharedPrefix, Waiting

IMAGE = 9


def row(number: int, tokens: list[int], *, image: str | None = None, cap: int | None = None) -> EncodedSample:
    input_ids = np.array([tokens])
    return EncodedSample(
        RecordKey(number, "default", 0),
        str(number),
        {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)},
        PromptFacts(),
        cap,
        image,
    )


class Arriving(Iterator[EncodedSample]):
    """Samples of which so many are there without waiting."""

    def __init__(self, given: list[EncodedSample], num_there: int) -> None:
        self._given, self.num_there, self.num_waited = iter(given), num_there, 0

    @property
    def ready(self) -> bool:
        return self.num_there > 0

    def __next__(self) -> EncodedSample:
        self.num_waited += self.num_there <= 0
        self.num_there -= 1
        return next(self._given)


def queue_of(samples: Iterator[EncodedSample], *, shared: bool = False, num_window_rows: int = 100) -> Queue:
    batcher = Batcher(max_rows=8, max_tokens=10_000, max_new_tokens=16)
    prefix = SharedPrefix(frozenset([IMAGE]), ends_after_images=False) if shared else None
    return Queue(samples, batcher, num_window_rows=num_window_rows, shared=prefix)


def taken(queue: Queue, num_rows: int = 100, num_tokens: int = 10_000) -> list[list[int]]:
    found = []
    while group := queue.take(num_rows, num_tokens):
        found.append([one.sample.key.row_index for one in group])
    return found


def test_prompts_read_together_fit_the_budget_of_tokens_and_none_is_lost() -> None:
    given = [row(number, [1] * (number % 13 + 3)) for number in range(60)]
    queue = queue_of(iter(given))
    assert queue.gather(1, wait=True)
    groups = taken(queue, num_tokens=40)
    assert sorted(number for group in groups for number in group) == list(range(60))
    assert all(max(number % 13 + 3 for number in group) * len(group) <= 40 for group in groups)
    assert queue.ended


def test_rows_with_long_answers_begin_first() -> None:
    given = [row(number, [1] * 5, cap=cap) for number, cap in enumerate([4, 60, 8, 64, 5])]
    queue = queue_of(iter(given))
    queue.gather(1, wait=True)
    order = taken(queue)[0]
    assert set(order[:2]) == {1, 3}
    assert set(order[-2:]) == {0, 4}


def test_it_takes_what_is_there_and_waits_only_when_told_to() -> None:
    samples = Arriving([row(number, [1] * 5) for number in range(20)], num_there=3)
    queue = queue_of(samples)
    assert not queue.gather(8, wait=False)
    assert samples.num_waited == 0
    assert queue.gather(8, wait=True)
    assert samples.num_waited == 5  # up to eight, and no more
    samples.num_there = 2
    assert queue.gather(8, wait=True)
    assert samples.num_waited == 5


def test_what_could_not_be_begun_comes_first_again() -> None:
    queue = queue_of(iter([row(number, [1] * 5) for number in range(6)]))
    queue.gather(1, wait=True)
    group = queue.take(4, 1000)
    queue.put_back(group[1:])
    assert [one.sample.key.row_index for one in queue.take(2, 1000)] == [one.sample.key.row_index for one in group[1:3]]


def prompt(*words: int) -> list[int]:
    return [1, 2, *[IMAGE] * 30, 3, *words]


def test_questions_about_one_image_share_what_they_begin_with() -> None:
    given = [row(number, prompt(4, 5, number), image="a") for number in range(10, 14)]
    assert SharedPrefix(frozenset([IMAGE]), ends_after_images=False)(given) == len(prompt(4, 5))
    queue = queue_of(iter([*given, row(0, prompt(7, 8), image="b")]), shared=True)
    queue.gather(1, wait=True)
    assert sorted(map(sorted, taken(queue))) == [[0], [10, 11, 12, 13]]


def test_nothing_is_shared_where_it_would_be_wrong_or_little() -> None:
    shared = SharedPrefix(frozenset([IMAGE]), ends_after_images=False)
    assert shared([row(0, prompt(4), image="a")]) == 0  # alone
    assert shared([row(0, prompt(4)), row(1, prompt(5))]) == 0  # images that nobody has compared
    assert shared([row(0, prompt(4), image="a"), row(1, prompt(4), image="a")]) == 0  # one prompt, computed once
    assert shared([row(0, [4, *prompt()], image="a"), row(1, [5, *prompt()], image="a")]) == 0  # other beginnings
    second = [row(n, [1, 2, *[IMAGE] * 30, 3, 4 + n, IMAGE, 6], image="a") for n in range(2)]
    assert shared(second) == 0  # an image behind what differs
    assert shared([row(0, [1, IMAGE, 3, 4], image="a"), row(1, [1, IMAGE, 3, 5], image="a")]) == 0  # three tokens


@pytest.mark.parametrize("after", [False, True])
def test_a_shared_beginning_does_not_end_within_an_image_and_right_after_it_where_positions_allow(after: bool) -> None:
    shared = SharedPrefix(frozenset([IMAGE]), ends_after_images=after)
    assert shared([row(n, [1, *[2] * 20, *[IMAGE] * (10 + n)], image="a") for n in range(2)]) == 0
    questions = [row(n, [1, *[IMAGE] * 40, 10 + n, 3, 4], image="a") for n in range(3)]
    assert shared(questions) == (41 if after else 0)


def test_questions_about_one_image_are_not_divided_between_two_batches() -> None:
    begin = [1, *[IMAGE] * 20, 2]
    given = [row(number, [*begin, *[100 + number] * 4], image=f"image {number // 3}") for number in range(9)]
    queue = queue_of(iter(given), shared=True)
    queue.gather(1, wait=True)
    groups = taken(queue, num_rows=7)
    assert [len(group) for group in groups] == [6, 3]
    assert sorted(number for group in groups for number in group) == list(range(9))
    queue = queue_of(iter(given), shared=True)
    queue.gather(1, wait=True)
    # A family that is alone is divided by the budgets: of rows, and of tokens of their own.
    assert [len(group) for group in taken(queue, num_rows=2)] == [2, 1, 2, 1, 2, 1]
    queue = queue_of(iter(given), shared=True)
    queue.gather(1, wait=True)
    assert [len(group) for group in taken(queue, num_tokens=44)] == [6, 3]  # two prefixes of 22
    queue = queue_of(iter(given), shared=True)
    queue.gather(1, wait=True)
    assert [len(group) for group in taken(queue, num_tokens=20)] == [3, 3, 3]  # five rows of 4


def test_questions_about_one_image_wait_for_those_that_may_still_come() -> None:
    begin = [1, *[IMAGE] * 20, 2]
    given = [row(number, [*begin, 100 + number], image=f"image {number // 4}") for number in range(16)]
    queue = queue_of(iter(given), shared=True, num_window_rows=6)
    families = []
    while queue.gather(6, wait=True) and not queue.ended:
        families += [sorted(one.sample.key.row_index for one in group) for group in windows(queue)]
    # Windows of six: the second image's two rows of the first window wait for the other two.
    assert families == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def windows(queue: Queue) -> list[list[Waiting]]:
    """What is taken before the queue gathers again."""
    groups = [queue.take(6, 10_000)]
    while queue._window:
        groups.append(queue.take(6, 10_000))
    return groups


def test_a_family_larger_than_a_window_and_rows_that_share_nothing_do_not_wait() -> None:
    begin = [1, *[IMAGE] * 20, 2]
    alone = [row(number, [*begin, 100 + number], image="a") for number in range(9)]
    strangers = [row(number, [1] * 5) for number in range(9)]
    apart = [row(number, [*begin, 100 + number], image=f"image {number // 4}") for number in range(9)]
    mixed = [*apart[:4], *strangers[4:]]
    for given, shared in ((alone, True), (strangers, True), (mixed, True), (apart, False)):
        queue = queue_of(iter(given), shared=shared, num_window_rows=6)
        queue.gather(6, wait=True)
        assert sum(map(len, windows(queue))) == 6
        queue.gather(6, wait=True)
        assert sum(map(len, windows(queue))) == 3
        assert queue.ended


def test_a_long_answer_that_comes_last_does_not_begin_last() -> None:
    samples = Arriving([row(number, [1] * 5, cap=60 if number == 9 else 4) for number in range(10)], num_there=7)
    queue = queue_of(samples)
    queue.gather(1, wait=False)
    assert len(queue.take(2, 1000)) == 2  # of a window of seven
    samples.num_there = 5
    queue.gather(100, wait=True)
    assert next(one.sample.key.row_index for one in queue.take(2, 1000)) == 9
    assert len(queue.take(100, 1000)) == 6
    assert queue.ended


def test_the_last_questions_of_all_are_taken_together() -> None:
    begin = [1, *[IMAGE] * 20, 2]
    given = [row(number, [*begin, 100 + number], image=f"image {number // 2}") for number in range(4)]
    queue = queue_of(iter(given), shared=True)
    queue.gather(6, wait=True)
    assert len(queue.take(6, 10_000)) == 4

"""Batches: every sample once, under the budgets, like beside like, padded on the side where padding does no harm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.records import EncodedSample, PromptFacts, RecordKey
from pipeline.tensors import batch as batch_module
from pipeline.tensors.batch import Batcher

PAD = 9


def sample(number: int, num_tokens: int, cap: int | None = None, **tensors: np.ndarray[Any, Any]) -> EncodedSample:
    input_ids = np.arange(100, 100 + num_tokens)[None]
    given = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)} | tensors
    return EncodedSample(RecordKey(number, "default", 0), str(number), given, PromptFacts(), cap)


def batcher_of(*, max_rows: int = 4, max_tokens: int = 1000, max_new_tokens: int = 10) -> Batcher:
    return Batcher(max_rows=max_rows, max_tokens=max_tokens, max_new_tokens=max_new_tokens, pad_id=PAD)


def numbers(group: list[EncodedSample]) -> list[int]:
    return [sample.key.row_index for sample in group]


def mixed(count: int, seed: int = 0) -> list[EncodedSample]:
    """Text and images of three shapes, prompts of 1 to 40 tokens."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        kind, length = random.integers(4), int(random.integers(1, 41))
        images = {} if kind == 3 else {"pixel_values": np.ones((1, int(kind) + 1, 3, 4, 4), np.float32)}
        found.append(sample(number, length, int(random.integers(1, 11)), **images))
    return found


# Groups --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_every_sample_is_in_exactly_one_group(count: int) -> None:
    groups = list(batcher_of().groups(iter(mixed(count))))
    assert sorted(number for group in groups for number in numbers(group)) == list(range(count))
    assert all(groups)


def test_no_group_exceeds_its_budgets() -> None:
    for group in batcher_of(max_rows=6, max_tokens=150).groups(iter(mixed(300))):
        assert len(group) <= 6
        widest = max(one.num_tokens + (one.max_new_tokens or 0) for one in group)
        assert len(group) * widest <= 150


def test_a_sample_above_the_budget_stands_alone() -> None:
    given = [sample(0, 5), sample(1, 500), sample(2, 5)]
    assert [numbers(group) for group in batcher_of(max_tokens=100).groups(iter(given))] == [[1], [0, 2]]


def test_the_room_for_the_answers_counts() -> None:
    roomy = [sample(number, 10, cap=90) for number in range(4)]
    assert [len(group) for group in batcher_of(max_tokens=200).groups(iter(roomy))] == [2, 2]
    uncapped = [sample(number, 10) for number in range(4)]
    assert [len(group) for group in batcher_of(max_tokens=200, max_new_tokens=40).groups(iter(uncapped))] == [4]


def test_rows_with_and_without_images_never_share_a_batch() -> None:
    for group in batcher_of(max_rows=50, max_tokens=100_000).groups(iter(mixed(300))):
        assert len({"pixel_values" in one.tensors for one in group}) == 1


def test_prompts_of_like_length_meet() -> None:
    given = [sample(number, 1 + number * 37 % 100) for number in range(512)]

    def padding(groups: list[list[EncodedSample]]) -> int:
        return sum(max(one.num_tokens for one in group) - member.num_tokens for group in groups for member in group)

    in_order = [given[start : start + 8] for start in range(0, 512, 8)]
    assert padding(list(batcher_of(max_rows=8, max_tokens=100_000).groups(iter(given)))) < padding(in_order) / 4


def test_the_longest_of_a_window_come_first() -> None:
    first = next(batcher_of(max_rows=2).groups(sample(number, length) for number, length in enumerate([3, 8])))
    assert numbers(first) == [1, 0]


def drawn_at_each_group(batcher: Batcher, given: Iterator[EncodedSample]) -> list[int]:
    """How many samples were taken from the stream when each group came."""
    num_drawn, found = 0, []

    def counted() -> Iterator[EncodedSample]:
        nonlocal num_drawn
        for one in given:
            num_drawn += 1
            yield one

    for _ in batcher.groups(counted()):
        found.append(num_drawn)
    return found


def test_the_first_batch_starts_with_few_samples_and_windows_grow() -> None:
    drawn = drawn_at_each_group(batcher_of(max_rows=4), iter([sample(number, 5) for number in range(124)]))
    # windows of 1, 2, 4, 8, 8 ... batches
    assert drawn == [4, *[12] * 2, *[28] * 4, *[60] * 8, *[92] * 8, *[124] * 8]


def test_a_window_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "_WINDOW_BYTES", 10_000)
    given = [sample(number, 5, pixel_values=np.zeros((1, 3, 32, 32), np.float32)) for number in range(32)]
    drawn = drawn_at_each_group(batcher_of(max_rows=16), iter(given))
    assert drawn == list(range(1, 33))  # 12 kB each: none is held for another


def test_a_budget_that_shrinks_holds_from_the_next_batch_on() -> None:
    batcher = batcher_of(max_rows=8)
    groups = batcher.groups(iter([sample(number, 5) for number in range(24)]))
    assert len(next(groups)) == 8
    batcher.max_rows = 2
    assert [len(group) for group in groups] == [2] * 8


# Padding -------------------------------------------------------------------------------------------------------------


def test_what_runs_along_the_tokens_is_padded_on_the_left() -> None:
    types = np.asarray([[0, 1, 1]])
    given = [sample(0, 3, mm_token_type_ids=types), sample(1, 5, mm_token_type_ids=np.ones((1, 5), np.int64))]
    batch = batcher_of().collate(given)
    assert batch["input_ids"].tolist() == [[PAD, PAD, 100, 101, 102], [100, 101, 102, 103, 104]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert batch["mm_token_type_ids"].tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]


def test_images_are_padded_on_the_right_with_zeros() -> None:
    small, large = np.full((1, 1, 3, 2, 4), 5.0, np.float32), np.full((1, 2, 3, 4, 2), 7.0, np.float32)
    batch = batcher_of().collate([sample(0, 3, pixel_values=small), sample(1, 3, pixel_values=large)])
    pixels = batch["pixel_values"]
    assert pixels.shape == (2, 2, 3, 4, 4)
    assert (pixels[0, :1, :, :2, :4] == 5).all()
    assert (pixels[1, :2, :, :4, :2] == 7).all()
    assert pixels.sum() == small.sum() + large.sum()


def test_lists_of_patches_are_joined_as_they_are() -> None:
    first, second = np.zeros((8, 6), np.float32), np.ones((4, 6), np.float32)
    grids = [np.asarray([[1, 2, 4]]), np.asarray([[1, 2, 2]])]
    given = [sample(i, 3, pixel_values=x, image_grid_thw=grids[i]) for i, x in enumerate((first, second))]
    batch = batcher_of().collate(given)
    assert batch["pixel_values"].tolist() == [*first.tolist(), *second.tolist()]
    assert batch["image_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 2]]


def test_a_mask_of_tokens_over_images_is_padded_on_both_sides() -> None:
    # Mllama: [1, tokens, images, tiles]
    one, two = np.ones((1, 3, 1, 4), np.int64), np.ones((1, 5, 2, 4), np.int64)
    batch = batcher_of().collate([sample(0, 3, cross_attention_mask=one), sample(1, 5, cross_attention_mask=two)])
    mask = batch["cross_attention_mask"]
    assert mask.shape == (2, 5, 2, 4)
    assert mask[0, :2].sum() == mask[0, :, 1].sum() == 0
    assert (mask[0, 2:, 0] == 1).all()
    assert (mask[1] == 1).all()


def test_an_image_as_long_as_its_prompt_is_still_an_image() -> None:
    given = [sample(0, 4, pixel_values=np.ones((1, 4, 2), np.float32)), sample(1, 6, pixel_values=np.ones((1, 6, 2)))]
    assert batcher_of().collate(given)["pixel_values"][0].sum(1).tolist() == [2, 2, 2, 2, 0, 0]


def test_a_batch_of_one_is_the_sample_itself() -> None:
    pixels = np.random.default_rng(0).standard_normal((1, 2, 3, 4, 4), dtype=np.float32)
    batch = batcher_of().collate([sample(0, 3, pixel_values=pixels)])
    assert torch.equal(batch["pixel_values"], torch.from_numpy(pixels))
    assert batch["attention_mask"].all()
    batch["pixel_values"].zero_()
    assert pixels.any()  # the sample keeps its own: it may be tried again


def test_an_encoders_prompts_are_padded_at_the_end() -> None:
    batcher = batcher_of()
    batcher.pads_right = True
    batch = batcher.collate([sample(0, 3), sample(1, 5)])
    assert batch["input_ids"].tolist() == [[100, 101, 102, PAD, PAD], [100, 101, 102, 103, 104]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_columns_of_padding_alone_can_be_asked_for() -> None:
    batch = batcher_of().collate(
        [sample(0, 3, cross_attention_mask=np.ones((1, 3, 1, 4), np.int64))], num_extra_tokens=2
    )
    assert batch["input_ids"].tolist() == [[PAD, PAD, 100, 101, 102]]
    assert batch["cross_attention_mask"][0, :, 0, 0].tolist() == [0, 0, 1, 1, 1]


def test_one_sample_shows_that_a_tensor_does_not_run_along_the_tokens() -> None:
    # InstructBLIP encodes the question a second time: here both are as long as their prompts by chance.
    question = [np.ones((1, 4), np.int64), np.ones((1, 6), np.int64), np.ones((1, 9), np.int64)]
    given = [sample(i, (4, 6, 5)[i], qformer_input_ids=ids) for i, ids in enumerate(question)]
    batcher = batcher_of(max_rows=8)
    list(batcher.groups(iter(given)))
    assert batcher.collate(given[:2])["qformer_input_ids"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]


# What a model does not bear ------------------------------------------------------------------------------------------


def test_without_padding_of_tokens_only_equal_lengths_share_a_batch() -> None:
    batcher = batcher_of(max_rows=16)
    batcher.may_pad_tokens = False
    groups = list(batcher.groups(iter(mixed(300))))
    assert all(len({one.num_tokens for one in group}) == 1 for group in groups)
    assert sorted(number for group in groups for number in numbers(group)) == list(range(300))
    assert max(map(len, groups)) > 1


def test_without_padding_of_images_only_equal_shapes_share_a_batch() -> None:
    batcher = batcher_of(max_rows=16)
    batcher.may_pad_images = False
    groups = list(batcher.groups(iter(mixed(300))))
    for group in groups:
        assert not batcher.pads_images(group)
        assert len({one.tensors["pixel_values"].shape for one in group if "pixel_values" in one.tensors}) <= 1
    assert max(map(len, groups)) == 16


def test_a_group_can_be_cut_anew_when_it_turns_out_that_it_must_not_be_padded() -> None:
    batcher = batcher_of(max_rows=8)
    [group] = batcher.groups(iter([sample(number, 3 + number % 2) for number in range(8)]))
    batcher.may_pad_tokens = False
    assert [{one.num_tokens for one in part} for part in batcher.split(group)] == [{4}, {3}]


def test_lists_of_patches_of_many_lengths_do_not_keep_like_prompts_apart() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 100, 512).tolist()
    patches = [np.zeros((count, 6), np.float32) for count in random.integers(4, 40, 512)]
    text = [sample(number, length) for number, length in enumerate(lengths)]
    both = [sample(number, length, pixel_values=patches[number]) for number, length in enumerate(lengths)]

    def widths(given: list[EncodedSample]) -> list[int]:
        groups = batcher_of(max_rows=8, max_tokens=100_000).groups(iter(given))
        return [max(one.num_tokens for one in group) for group in groups]

    assert widths(both) == widths(text)

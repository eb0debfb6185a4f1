"""The sampler: the draws of a row are its own, and follow the model's filtered distribution."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from pipeline.records import EncodedSample, PromptFacts, RecordKey
from pipeline.vlm.generation import SamplingSettings
from pipeline.vlm.sampling import Sampler, row_seed, step_seed, uniform_noise

NUM_TOKENS = 40
THEIRS = {  # in the order of generate()
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
ROW_SEED = 16001562680801378611
STEP_SEEDS = [8998093390538466961, 720366242649447013, 6111668631415793631]


def row(number: int, sample_index: int = 0, prompt_name: str = "default") -> EncodedSample:
    return EncodedSample(RecordKey(number, prompt_name, sample_index), f"row {number}", {}, PromptFacts())


def logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, NUM_TOKENS, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(sampler: Sampler, logits_BV: torch.Tensor, rows: list[EncodedSample], step: int = 0) -> list[int]:
    token_B, finite_B = sampler.choose(logits_BV, rows, [step] * len(rows))
    assert finite_B.all()
    return token_B.tolist()  # type: ignore[no-any-return]


def distribution(settings: SamplingSettings, logits_V: torch.Tensor, num_draws: int = 4000) -> np.ndarray[Any, Any]:
    """How often each token came, over as many rows with equal logits."""
    rows = [row(number) for number in range(num_draws)]
    found = Counter(drawn(Sampler(settings, seed=3), logits_V.expand(num_draws, -1), rows))
    return np.asarray([found[token] for token in range(len(logits_V))])


def test_a_row_draws_the_same_in_any_batch_place_and_order() -> None:
    sampler = Sampler(SamplingSettings(do_sample=True, temperature=1.3, top_p=0.9), seed=42)
    rows, logits_BV = [row(number) for number in range(16)], logits(16)
    together = drawn(sampler, logits_BV, rows, step=5)
    assert together == [drawn(sampler, logits_BV[place : place + 1], [rows[place]], step=5)[0] for place in range(16)]
    order = np.random.default_rng(0).permutation(16).tolist()
    assert [together[place] for place in order] == drawn(sampler, logits_BV[order], [rows[p] for p in order], step=5)


def test_samples_prompts_steps_and_seeds_draw_differently() -> None:
    settings, flat = SamplingSettings(do_sample=True), torch.zeros(1, 50_000)
    draws = [
        drawn(Sampler(settings, seed), flat, [row(0, sample_index, name)], step)[0]
        for seed in (1, 2)
        for sample_index in (0, 1, 2)
        for name in ("short", "long")
        for step in (0, 1)
    ]
    assert len(set(draws)) == len(draws)


def test_the_draws_of_a_row_hang_on_its_id_and_not_on_its_place() -> None:
    moved = EncodedSample(RecordKey(99, "default", 0), "row 5", {}, PromptFacts())
    assert row_seed(42, moved) == row_seed(42, row(5)) != row_seed(42, row(6))


def reference(seed: int, place: int) -> float:
    """splitmix64 in whole numbers: the place-th number of a stream, in (0, 1)."""
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return float(((z ^ (z >> 31)) >> 11) + 0.5) / 2**53


def test_the_stream_of_random_numbers_is_fixed_for_all_time() -> None:
    # A changed value changes every sampled answer of every unfinished run.
    assert row_seed(42, row(1)) == ROW_SEED
    assert [step_seed(ROW_SEED, step) for step in range(3)] == STEP_SEEDS
    tokens = torch.tensor([[0, 1, 2, 149_999], [7, 3, 0, 250_000]])
    noise_BV = uniform_noise(STEP_SEEDS[:2], tokens)
    for seed, numbers, found in zip(STEP_SEEDS, tokens.tolist(), noise_BV.tolist(), strict=False):
        assert found == [reference(seed, number) for number in numbers]


def test_the_noise_of_tokens_steps_and_rows_fills_the_unit_interval_evenly() -> None:
    tokens, chances = torch.arange(1000), []
    for step in range(40):
        noise_BV = uniform_noise(
            [step_seed(row_seed(step // 20, row(number)), step) for number in range(4)], tokens.expand(4, -1)
        )
        assert noise_BV.min() > 0 and noise_BV.max() < 1
        chances += [chisquare(np.histogram(noise_V, bins=20, range=(0, 1))[0]).pvalue for noise_V in noise_BV.numpy()]
    # One seed may look odd, as chance will have it; over many seeds chance itself must be even.
    assert kstest(chances, "uniform").pvalue > 0.01


def test_the_rounding_of_another_batch_moves_no_draw() -> None:
    """Logits of a large vocabulary, and the same with noise as float32 sums in another order have."""
    settings = SamplingSettings(do_sample=True, temperature=1.2)
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(60, 100_000, generator=generator) * 3
    noise_BV = torch.randn(logits_BV.shape, generator=generator) * 3e-7 * logits_BV.abs().max()
    rows = [row(number) for number in range(60)]
    assert not torch.equal(logits_BV, logits_BV + noise_BV)
    assert drawn(Sampler(settings, 1), logits_BV, rows) == drawn(Sampler(settings, 1), logits_BV + noise_BV, rows)


def test_top_k_of_one_is_greedy() -> None:
    rows, logits_BV = [row(number) for number in range(64)], logits(64)
    greedy = drawn(Sampler(SamplingSettings(do_sample=False), 0), logits_BV, rows)
    assert greedy == logits_BV.argmax(-1).tolist()
    assert drawn(Sampler(SamplingSettings(do_sample=True, top_k=1), 0), logits_BV, rows) == greedy
    assert drawn(Sampler(SamplingSettings(do_sample=True, temperature=0.0), 0), logits_BV, rows) == greedy
    assert drawn(Sampler(SamplingSettings(do_sample=True, top_p=1e-6), 0), logits_BV, rows) == greedy


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(do_sample=True),
        SamplingSettings(do_sample=True, temperature=0.6),
        SamplingSettings(do_sample=True, top_k=5),
        SamplingSettings(do_sample=True, top_p=0.8),
        SamplingSettings(do_sample=True, temperature=1.7, top_k=12, top_p=0.9),
        SamplingSettings(do_sample=True, warpers={"min_p": 0.05}),
        SamplingSettings(do_sample=True, temperature=1.5, warpers={"typical_p": 0.9}),
        SamplingSettings(do_sample=True, top_p=0.95, warpers={"epsilon_cutoff": 0.02}),
        SamplingSettings(do_sample=True, temperature=1.5, warpers={"eta_cutoff": 0.03, "min_p": 0.05}),
    ],
    ids=lambda one: f"t={one.temperature} k={one.top_k} p={one.top_p} {dict(one.warpers)}",
)
def test_draws_have_the_support_and_the_frequencies_of_transformers_warpers(settings: SamplingSettings) -> None:
    logits_V = logits(1, seed=11)[0]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    for name, kind in THEIRS.items():
        if name in settings.warpers:
            warpers.append(kind(settings.warpers[name]))
    expected = torch.softmax(warpers(None, logits_V[None].clone()).double(), -1)[0].numpy()
    found = distribution(settings, logits_V)
    assert (found[expected == 0] == 0).all()
    common = expected * found.sum() >= 5  # what chi-square needs; the rest counts as one class
    observed = np.append(found[common], found[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * found.sum()
    keep = wanted > 0
    assert chisquare(observed[keep], wanted[keep]).pvalue > 1e-3


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits_BV, said = logits(8), torch.randint(0, NUM_TOKENS, (8, 12), generator=torch.Generator().manual_seed(1))
    seen_BV = torch.zeros(8, NUM_TOKENS, dtype=torch.bool).scatter(1, said, True)
    expected = RepetitionPenaltyLogitsProcessor(1.8)(said, logits_BV.clone()).argmax(-1)
    sampler = Sampler(SamplingSettings(do_sample=False, repetition_penalty=1.8), 0)
    assert sampler.needs_history
    token_B, _ = sampler.choose(logits_BV, [row(n) for n in range(8)], [0] * 8, seen_BV)
    assert token_B.tolist() == expected.tolist() != logits_BV.argmax(-1).tolist()


def test_the_callers_logits_are_left_as_they_are() -> None:
    logits_BV = logits(4)
    before = logits_BV.clone()
    settings = SamplingSettings(do_sample=True, top_k=3, repetition_penalty=2.0)
    Sampler(settings, 0).choose(logits_BV, [row(n) for n in range(4)], [0] * 4, logits_BV > 0)
    assert torch.equal(logits_BV, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_row_without_finite_logits_is_told_and_the_others_draw_as_ever(bad: float, do_sample: bool) -> None:
    sampler = Sampler(SamplingSettings(do_sample=do_sample, top_p=0.9, top_k=7), 0)
    rows, logits_BV = [row(number) for number in range(4)], logits(4)
    expected = drawn(sampler, logits_BV, rows)
    logits_BV[2, 7] = bad
    logits_BV[1, 3] = -torch.inf  # a token that is ruled out is nothing bad
    token_B, finite_B = sampler.choose(logits_BV, rows, [0] * 4)
    assert finite_B.tolist() == [True, True, False, True]
    assert [token_B[place].item() for place in (0, 3)] == [expected[0], expected[3]]
    all_nan = torch.full((1, NUM_TOKENS), torch.nan)
    token_B, finite_B = sampler.choose(all_nan, rows[:1], [0])
    assert not finite_B.any()
    assert 0 <= token_B.item() < NUM_TOKENS


def test_half_precision_logits_are_drawn_from_in_full() -> None:
    flat = torch.zeros(2000, 3000, dtype=torch.bfloat16)
    tokens = drawn(Sampler(SamplingSettings(do_sample=True), 0), flat, [row(number) for number in range(2000)])
    assert len(set(tokens)) > 1300  # of 3000: about 1460 are expected; a bfloat16 sum would know some 256 places

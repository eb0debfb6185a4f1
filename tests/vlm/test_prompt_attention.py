"""Attention of prompts, some queries at a time: what torch's kernel gives for the whole, and the same answers."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_slots_engine import answers_of, engines_of, many
from tiny_models import family
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.vlm.slots import prompt_attention, race, speedups
from pipeline.vlm.slots.prompt_attention import WAYS, Way, attend, attended, images_attended

ROWS, HEADS, SIZE, NUM = 2, 4, 8, 21
MODULE = SimpleNamespace(is_causal=True)


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_attention, "_QUERIES", dict.fromkeys(WAYS, 6))
    monkeypatch.setattr(prompt_attention, "_QUERIES_OF_IMAGES", 8)
    prompt_attention._of_this_forward.forget()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


def causal(num_queries: int, num_cells: int) -> torch.Tensor:
    return torch.ones(ROWS, 1, num_queries, num_cells, dtype=torch.bool).tril(num_cells - num_queries)


def padded() -> torch.Tensor:
    mask = causal(NUM, NUM)
    mask[0, :, :, :8] = False  # more than a stretch: its queries see nothing
    return mask


def windowed() -> torch.Tensor:
    mask = causal(NUM, NUM)
    return mask & ~mask.tril(-5)


def packed() -> torch.Tensor:
    mask = causal(NUM, NUM + 10)
    mask[:, :, 9:, 10:19] = False  # a second prompt over the same prefix
    return mask


def images() -> torch.Tensor:
    mask = causal(NUM, NUM)
    mask[:, :, 3:12, 3:12] = True  # its tokens see each other
    return mask


MASKS: dict[str, Any] = {
    "causal": lambda: causal(NUM, NUM),
    "padded": padded,
    "sliding windows": windowed,
    "packs": packed,
    "images seen both ways": images,
    "the end of a prompt": lambda: causal(7, NUM),
}


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("as_number", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_each_query_gets_what_it_gets_in_the_whole(name: str, as_number: bool, group: int, way: Way) -> None:
    mask = MASKS[name]()
    query = torch.randn(ROWS, HEADS, mask.shape[2], SIZE)
    key, value = (torch.randn(ROWS, HEADS // group, mask.shape[3], SIZE) for _ in range(2))
    whole = [tensor.repeat_interleave(group, 1) for tensor in (key, value)]
    wanted = functional.scaled_dot_product_attention(query, *whole, attn_mask=mask, scale=0.3).transpose(1, 2)
    given = mask
    if as_number:
        given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    found, _ = attend(MODULE, query, key, value, given, scaling=0.3, way=way)
    sees = mask.any(-1)[:, 0]
    assert found.isfinite().all()
    torch.testing.assert_close(found[sees], wanted[sees], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [0.0, 7.3])
@pytest.mark.parametrize("name", MASKS)
def test_half_precision_rounds_and_no_more(name: str, bias: float, dtype: torch.dtype, way: Way) -> None:
    mask = MASKS[name]()
    query = torch.randn(ROWS, HEADS, mask.shape[2], SIZE).to(dtype)
    key, value = (torch.randn(ROWS, HEADS // 2, mask.shape[3], SIZE).to(dtype) for _ in range(2))
    # Neighbours are looked at more than others; a number that half precision would round.
    distance = torch.arange(mask.shape[3]) - torch.arange(mask.shape[2])[:, None]
    added = (bias / (1 + distance.abs())).expand(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    whole = [tensor.float().repeat_interleave(2, 1) for tensor in (key, value)]
    wanted = functional.scaled_dot_product_attention(query.float(), *whole, attn_mask=added).transpose(1, 2)
    found, _ = attend(MODULE, query, key, value, added if bias else mask, way=way)
    sees = mask.any(-1)[:, 0]
    assert found.dtype == dtype and found.isfinite().all()
    torch.testing.assert_close(found[sees].float(), wanted[sees], rtol=2e-2, atol=2e-2)


def test_no_mask_is_causal(way: Way) -> None:
    query, key, value = torch.randn(3, ROWS, HEADS, NUM, SIZE).unbind()
    wanted = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    found, _ = attend(MODULE, query, key, value, None, way=way)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2])
def test_tokens_of_images_look_at_each_other(group: int, way: Way) -> None:
    query = torch.randn(ROWS, HEADS, NUM, SIZE)
    key, value = (torch.randn(ROWS, HEADS // group, NUM, SIZE) for _ in range(2))
    whole = [tensor.repeat_interleave(group, 1) for tensor in (key, value)]
    wanted = functional.scaled_dot_product_attention(query, *whole, scale=0.3).transpose(1, 2)
    module = SimpleNamespace(is_causal=False, num_key_value_groups=group)
    found, _ = attend(module, query, key, value, None, scaling=0.3, way=way)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_stretch_computes_no_cells_that_it_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[int, int]] = []
    original = functional.scaled_dot_product_attention

    def watching(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        computed.append((query.shape[2], key.shape[2]))
        return original(query, key, value, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watching)
    tensors = torch.randn(3, ROWS, HEADS, NUM, SIZE).unbind()
    attend(MODULE, *tensors, windowed(), way=WAYS["float32"])
    attend(MODULE, *tensors, None, way=WAYS["float32"])
    assert computed == [(6, 6), (6, 10), (6, 10), (3, 7), (6, 6), (6, 12), (6, 18), (3, 21)]


@pytest.mark.parametrize("masked", [False, True])
def test_scores_take_little_memory_however_long_the_prompts(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    softmax = torch.softmax

    def watching(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(4 * scores.numel())
        return softmax(scores, *args, **kwargs)

    monkeypatch.setattr(torch, "softmax", watching)
    monkeypatch.setattr(prompt_attention, "_SCORE_BYTES", 4 * ROWS * HEADS * NUM * 3)
    monkeypatch.setattr(prompt_attention, "_MIN_QUERIES", 2)
    tensors = torch.randn(3, ROWS, HEADS, NUM, SIZE).unbind()
    wanted = functional.scaled_dot_product_attention(*tensors, is_causal=masked).transpose(1, 2)
    module = SimpleNamespace(is_causal=masked)
    found, _ = attend(module, *tensors, None, way=WAYS["products"])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(sizes) == 7 and max(sizes) <= 4 * ROWS * HEADS * NUM * 3


def test_what_is_not_known_is_torchs_own(way: Way) -> None:
    query, key, value = torch.randn(3, ROWS, HEADS, NUM, SIZE).unbind()
    bias = torch.randn(1, HEADS, NUM, NUM)
    wanted = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)
    found, _ = attend(SimpleNamespace(is_causal=False), query, key, value, None, position_bias=bias, way=way)
    torch.testing.assert_close(found, wanted)
    for_each_head = torch.rand(ROWS, HEADS, NUM, NUM) > 0.3
    wanted = functional.scaled_dot_product_attention(query, key, value, attn_mask=for_each_head).transpose(1, 2)
    assert torch.equal(attend(MODULE, query, key, value, for_each_head, way=way)[0], wanted)


def test_the_model_has_its_own_functions_afterwards(way: Way) -> None:
    model = family("llava").model
    text, vision = model.config.get_text_config(decoder=True), model.config.vision_config
    assert text._attn_implementation == vision._attn_implementation == "sdpa"
    with attended(model, way):
        assert (text._attn_implementation, vision._attn_implementation) == (way.function, "sdpa")
        attend(MODULE, *torch.randn(3, ROWS, HEADS, NUM, SIZE).unbind(), None, way=way)
        assert len(prompt_attention._of_this_forward)
    assert text._attn_implementation == "sdpa"
    with images_attended(model, way):
        seen = way.function if way.images else "sdpa"
        assert (text._attn_implementation, vision._attn_implementation) == ("sdpa", seen)
    for part in (attended, images_attended):
        with pytest.raises(RuntimeError), part(model, way):
            raise RuntimeError("a model that fails")
        with part(model, None):
            assert text._attn_implementation == vision._attn_implementation == "sdpa"
    assert text._attn_implementation == vision._attn_implementation == "sdpa"
    assert not len(prompt_attention._of_this_forward)


@pytest.mark.parametrize("name", ["llava", "smolvlm", "idefics2", "qwen2_5_vl"])
def test_answers_are_those_of_padded_batches(name: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[bool] = []

    def watching(module: Any, *args: Any, **kwargs: Any) -> Any:
        computed.append("Vision" in type(module).__name__ or "CLIP" in type(module).__name__)
        return attend(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, way.function, partial(watching, way=way))
    monkeypatch.setattr(speedups, "fastest_way", lambda *args, **kwargs: way.name)
    slots, static = engines_of(name)
    given = many(name)
    wanted = answers_of(static, given)
    assert not computed
    assert answers_of(slots, given) == wanted
    assert not all(computed) and any(computed) is way.images
    assert slots.numerics["prompt_attention"] == way.name and all(slots.fit.verdicts.values())
    assert slots.fit._speedups.features is not None


@pytest.mark.parametrize("problem", ["it raises", "it is wrong"])
def test_attention_that_goes_wrong_is_given_up(problem: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        if problem == "it raises":
            raise RuntimeError("head of 12 dimensions")
        return attend(*args, **kwargs)[0] + 1, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, way.function, partial(wrong, way=way))
    monkeypatch.setattr(speedups, "fastest_way", lambda *args, **kwargs: way.name)
    slots, static = engines_of()
    given = many()
    assert answers_of(slots, given) == answers_of(static, given)
    assert slots.numerics["prompt_attention"] == "torch" and all(slots.fit.verdicts.values())


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ((3.0, 2.0, 1.0), "products"),
        ((3.0, 1.0, 2.0), "float32"),
        ((1.0, 1.0, 0.99), "torch"),
        ((1.0, 2.0, 3.0), "torch"),
    ],
)
def test_the_fastest_is_taken(
    seconds: tuple[float, float, float], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(race.time, "perf_counter", lambda: clock.now)

    def takes(seconds: float) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            clock.now += seconds

        return call

    torchs, float32, products = map(takes, seconds)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", torchs)
    ways = {"float32": Way("float32", "", float32), "products": Way("products", "", products)}
    monkeypatch.setattr(prompt_attention, "WAYS", ways)
    text = family("llava").model.config.get_text_config(decoder=True)
    assert prompt_attention.fastest_way(text, torch.float32, num_rows=2, num_tokens=20) == "float32"  # at every start
    assert prompt_attention.fastest_way(text, torch.bfloat16, num_rows=2, num_tokens=20) == wanted

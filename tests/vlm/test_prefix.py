"""Prompts that go on from a shared prefix, packed into few rows or each in its own: what whole prompts give."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import PAD, family
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.vlm.slots.final_layer import computed_at
from pipeline.vlm.slots.prefix import Continuation, Prefix
from pipeline.vlm.slots.prompt_attention import WAYS, Way, attend, attended

_RANDOM = np.random.default_rng(5)
PREFIXES = [_RANDOM.integers(10, 250, length) for length in (7, 12)]
# Of each prompt: its prefix, and the number of tokens after it.
PROMPTS = ((0, 3), (1, 1), (0, 6), (0, 2), (1, 4), (1, 4))


def whole(model: Any, tokens: np.ndarray) -> tuple[torch.Tensor, DynamicCache]:
    """A prompt alone: logits [V] of its last token, and its keys and values."""
    cache = DynamicCache()
    logits_1TV = model(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.arange(len(tokens))[None],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits_1TV[0, -1], cache


@pytest.fixture
def model() -> Any:
    return family("smolvlm").model


@pytest.mark.parametrize(("max_pack_tokens", "num_rows"), [(512, 2), (9, 3), (5, 5), (0, 6)])
@pytest.mark.parametrize("ends_only", [True, False])
@torch.inference_mode()
def test_each_prompt_has_the_logits_and_cells_of_the_whole(
    model: Any, max_pack_tokens: int, num_rows: int, ends_only: bool
) -> None:
    prefixes = []
    for tokens in PREFIXES:
        _, cache = whole(model, tokens)
        layers = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers]
        prefixes.append(Prefix(model, layers, torch.tensor([len(tokens) - 1])))
    rests = [_RANDOM.integers(10, 250, length) for _, length in PROMPTS]
    found = Continuation(
        [prefixes[which] for which, _ in PROMPTS],
        rests,
        max_pack_tokens=max_pack_tokens,
        pad_token_id=PAD,
        like=prefixes[0].layers[0][0],
    )
    assert len(found.input_ids_FR) == num_rows
    with computed_at(model, found.ends):
        logits_FEV = model(
            input_ids=found.input_ids_FR,
            attention_mask=found.mask,
            position_ids=found.position,
            past_key_values=found.cache,
            use_cache=True,
            **({"logits_to_keep": torch.tensor(found.ends)} if ends_only else {}),
        ).logits
    logits_BV = found.at_ends(logits_FEV)
    for prompt, (which, length) in enumerate(PROMPTS):
        tokens = np.concatenate([PREFIXES[which], rests[prompt]])
        logits_V, cache = whole(model, tokens)
        torch.testing.assert_close(logits_BV[prompt], logits_V, rtol=1e-5, atol=1e-5)
        assert found.end_position[prompt].tolist() == [len(tokens) - 1]
        start, stop = found.spans[prompt]
        assert stop - start == length
        for ours, theirs in zip(found.cache.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                ours_HTD = getattr(ours, name)[found.pack_B[prompt]][:, start:stop]
                wanted_HTD = getattr(theirs, name)[0, :, -length:]
                torch.testing.assert_close(ours_HTD, wanted_HTD, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_last_layer_computes_the_tokens_that_are_asked_for_and_no_others(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.from_numpy(_RANDOM.integers(10, 250, (2, 9)))
    layer = model.get_decoder().layers[-1]
    widths: list[int] = []
    for part in (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.gate_proj):

        def watching(hidden: torch.Tensor, forward: Any = part.forward) -> torch.Tensor:
            widths.append(hidden.shape[1])
            found: torch.Tensor = forward(hidden)
            return found

        monkeypatch.setattr(part, "forward", watching)
    plain_2TV = model(input_ids=tokens).logits
    with computed_at(model, [4, 8]):
        found_2TV = model(input_ids=tokens).logits
    with pytest.raises(RuntimeError, match="boom"), computed_at(model, [-1]):
        raise RuntimeError("boom")
    model(input_ids=tokens)
    assert widths == [9, 9, 9, 9, 2, 2, 9, 9, 9]  # keys and values of all
    torch.testing.assert_close(found_2TV[:, [4, 8]], plain_2TV[:, [4, 8]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found_2TV[:, 3], plain_2TV[:, 3])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("places", [[-1], [4, 8]])
@torch.inference_mode()
def test_the_last_layer_attends_from_the_tokens_that_are_asked_for(
    model: Any, places: list[int], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.from_numpy(_RANDOM.integers(10, 250, (2, 9)))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    plain_2TV = model(input_ids=tokens, attention_mask=mask).logits
    numbers: list[int] = []

    def watching(query_BQTD: torch.Tensor, *args: Any) -> torch.Tensor:
        numbers.append(query_BQTD.shape[2])
        return way.compute(query_BQTD, *args)

    watched = partial(attend, way=replace(way, compute=watching))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, way.function, watched)
    for given in (mask, None):
        wanted_2TV = plain_2TV if given is not None else model(input_ids=tokens).logits
        with computed_at(model, places), attended(model, way):
            found_2TV = model(input_ids=tokens, attention_mask=given).logits
        torch.testing.assert_close(found_2TV[:, places], wanted_2TV[:, places], rtol=1e-5, atol=1e-5)
    with attended(model, way):
        model(input_ids=tokens)
    assert numbers == [9, len(places), 9, len(places), 9, 9]


def test_a_forward_that_a_library_has_put_there_stays(model: Any) -> None:
    part = model.get_decoder().layers[-1].mlp
    widths: list[int] = []

    def hooked(hidden: torch.Tensor) -> torch.Tensor:
        widths.append(hidden.shape[1])
        return type(part).forward(part, hidden)

    part.forward = hooked
    try:
        with computed_at(model, [-1]):
            part(torch.ones(2, 9, 32))
        part(torch.ones(2, 9, 32))
    finally:
        del part.forward
    assert widths == [1, 9]


@torch.inference_mode()
def test_a_feed_forward_part_that_gives_more_than_a_tensor_computes_all(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = model.get_decoder().layers[-1].mlp
    forward = type(part).forward
    monkeypatch.setattr(type(part), "forward", lambda self, hidden: (forward(self, hidden), "choices"))
    with computed_at(model, [-1]):
        found, _ = part(torch.ones(2, 9, 32))
    assert found.shape == (2, 9, 32)

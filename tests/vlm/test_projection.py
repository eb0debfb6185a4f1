"""Joined and packed products: the numbers of the layers they stand for, and the model as it was afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from pipeline.vlm.slots import projection
from pipeline.vlm.slots.projection import Choice, Projections


class Block(nn.Module):
    """Attention's and a gated layer's projections, some with a bias."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 32, bias), nn.Linear(32, 8, bias), nn.Linear(32, 8, bias)
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias), nn.Linear(32, 48, bias)
        self.o_proj = nn.Linear(48, 32, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        second = torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return torch.cat([first, self.o_proj(second)], -1)


def model_of(dtype: torch.dtype, *, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(bias=bias) for _ in range(1)]).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", ["plain", "packed", "packed float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_layers(dtype: torch.dtype, kernel: str, bias: bool) -> None:
    model = model_of(dtype, bias=bias)
    plain = copy.deepcopy(model)
    Projections(
        model, fuse=True, pack=True, free_bytes=1 << 30, choose=lambda weights: Choice((kernel, "plain", kernel))
    )
    for shape in ((1, 32), (16, 1, 32), (3, 30, 32), (2, 300, 32)):
        x = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(model(x), plain(x), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-3)


def test_three_products_become_one_and_restoring_brings_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(torch.float32, bias=True)
    plain = copy.deepcopy(model)
    projections = Projections(model, fuse=True, pack=False, free_bytes=0)
    calls: list[int] = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        projection.functional, "linear", lambda x, weight, bias: calls.append(len(weight)) or linear(x, weight, bias)
    )
    x = torch.randn(4, 32)
    found = model(x)
    assert calls == [48, 96, 32]
    monkeypatch.undo()
    projections.restore()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(model(x), plain(x))
    torch.testing.assert_close(found, plain(x))


def test_an_input_that_is_not_shared_is_computed_by_the_layer_itself() -> None:
    model = model_of(torch.float32, bias=False)
    block = model[0]  # type: ignore[index]
    plain = copy.deepcopy(block)
    Projections(model, fuse=True, pack=False, free_bytes=0)
    one, other = torch.randn(4, 32), torch.randn(4, 32)
    block.q_proj(one)
    torch.testing.assert_close(block.k_proj(other), plain.k_proj(other))
    torch.testing.assert_close(block.v_proj(one), plain.v_proj(one))


def test_copies_are_made_only_where_memory_allows() -> None:
    model = model_of(torch.bfloat16, bias=False)
    num_bytes = 3 * sum(weight.nbytes for weight in model.parameters())
    wanted = Choice(("packed", "packed", "packed float32"))
    for free_bytes, found in ((num_bytes - 1, Choice()), (num_bytes, wanted)):
        packed = Projections(model, fuse=False, pack=True, free_bytes=free_bytes, choose=lambda weights: wanted)
        assert packed.choice == found


@pytest.mark.parametrize(
    ("few", "some", "many", "wanted"),
    [
        ((3.0, 1.0, 2.0), (3.0, 1.0, 2.0), (1.02, 1.0, 2.0), ("packed", "packed", "packed")),
        ((3.0, 1.0, 2.0), (3.0, 1.0, 2.0), (0.98, 1.0, 2.0), ("packed", "packed", "plain")),
        ((1.02, 1.0, 2.0), (1.04, 1.0, 2.0), (1.03, 2.0, 1.0), ("plain", "plain", "plain")),
        ((3.0, 1.0, 2.0), (3.0, 2.0, 1.0), (1.02, 1.01, 1.0), ("packed", "packed float32", "packed float32")),
        ((3.0, 1.0, 0.99), (1.0, 2.0, 2.0), (1.0, 0.99, 2.0), ("packed float32", "plain", "plain")),
    ],
)
def test_a_copy_that_is_worth_its_memory_serves_all_rows(
    few: tuple[float, ...], some: tuple[float, ...], many: tuple[float, ...], wanted: tuple[str, ...]
) -> None:
    kinds = ("plain", "packed", "packed float32")
    assert projection._fastest([dict(zip(kinds, each, strict=True)) for each in (few, some, many)]) == Choice(wanted)


class GatedPart(nn.Module):
    """A feed-forward part as transformers' models have them; `twice` looks at the gate without its activation, too."""

    def __init__(self, function: nn.Module, *, bias: bool, twice: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias), nn.Linear(32, 48, bias)
        self.down_proj, self.act_fn, self.twice = nn.Linear(48, 32, bias), function, twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate) * (gate if self.twice else self.up_proj(x)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_packed_product_applies_what_its_output_goes_through(dtype: torch.dtype, name: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(GatedPart(ACT2FN[name], bias=bias)).to(dtype).requires_grad_(False)
    plain = copy.deepcopy(model)
    wanted = Choice(("packed",) * 3)
    projections = Projections(model, fuse=True, pack=True, free_bytes=1 << 30, choose=lambda weights: wanted)
    assert isinstance(model[0].act_fn, nn.Identity) is (name != "quick_gelu")  # which oneDNN has not
    for shape in ((1, 32), (3, 30, 32), (2, 300, 32)):
        x = torch.randn(shape, dtype=dtype)
        error = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(model(x), plain(x), rtol=error, atol=error)
    projections.restore()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("problem", ["the gate is looked at as it is", "it takes more than rows", "float32 is faster"])
def test_what_does_not_compute_the_same_so_keeps_its_activation(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part = GatedPart(nn.SiLU(), bias=False, twice=problem.startswith("the gate"))
    if problem.startswith("it takes"):
        monkeypatch.setattr(GatedPart, "forward", lambda self, x, experts: x)
    names = ("packed", "packed", "packed float32") if problem.startswith("float32") else ("packed",) * 3
    model = nn.Sequential(part).to(torch.bfloat16).requires_grad_(False)
    plain = copy.deepcopy(model)
    Projections(model, fuse=True, pack=True, free_bytes=1 << 30, choose=lambda weights: Choice(names))
    assert isinstance(part.act_fn, nn.SiLU) and isinstance(part.gate_proj, projection.Projection)
    if not problem.startswith("it takes"):
        x = torch.randn(3, 32, dtype=torch.bfloat16)
        torch.testing.assert_close(model(x), plain(x), rtol=2e-2, atol=2e-2)


def test_a_choice_is_read_from_its_own_text() -> None:
    for choice in (Choice(), Choice(("packed", "plain", "packed float32"))):
        assert Choice.parse(str(choice)) == choice
    for text in ("", "plain", "16 rows: plain", "16 rows: plain, 64 rows: plain, 512 rows: fast", str(Choice()) + ", "):
        with pytest.raises(ValueError, match="is no choice of products"):
            Choice.parse(text)

"""A disabled expert: nothing goes to it, weights sum to what they should, and the rest stays."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_mixcn.model import load_mixtral, load_moe
from lightning_mixcn.model.experts.observe import observe_routing
from lightning_mixcn.model.experts.routing import choose_experts
from lightning_mixcn.studies.experts.disabling import (
    MODES,
    DisabledExpert,
    Mode,
    disabled_expert,
    disabled_routing,
)
from lightning_mixcn.testing import save_tiny_mixtral, save_tiny_model
from tests.studies.experts.stock_experts import stock_model, without_expert

IDS = torch.randint(3, 258, (2, 40), generator=torch.Generator().manual_seed(0))
Routing = dict[int, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def model(routed_base: Path) -> nn.Module:
    return load_mixtral(routed_base, quantization="none", dtype="float32").eval()


def routing_of(model: nn.Module) -> Routing:
    seen: Routing = {}

    def observe(layer: int, _logits: Tensor, weights: Tensor, index: Tensor) -> None:
        seen[layer] = weights.clone(), index.clone()

    with torch.no_grad(), observe_routing(model, observe):
        model(IDS)
    return seen


@pytest.mark.parametrize("expert", range(4))
def test_a_masked_expert_receives_no_token_and_weights_sum_to_1(expert: int, model: nn.Module) -> None:
    before = routing_of(model)
    assert (before[1][1] == expert).any()
    with disabled_expert(model, 1, DisabledExpert("mask", expert)):
        weights_TK, index_TK = routing_of(model)[1]
    assert not (index_TK == expert).any()
    assert (index_TK[:, 0] != index_TK[:, 1]).all()
    torch.testing.assert_close(weights_TK.sum(1), torch.ones(80))
    others_T = (before[1][1] != expert).all(1)
    assert torch.equal(index_TK[others_T], before[1][1][others_T])
    assert torch.equal(weights_TK[others_T], before[1][0][others_T])


def test_a_zeroed_expert_has_the_weight_0_and_the_others_keep_theirs(model: nn.Module) -> None:
    before = routing_of(model)[0]
    with disabled_expert(model, 0, DisabledExpert("zero", 2)):
        weights_TK, index_TK = routing_of(model)[0]
    assert torch.equal(index_TK, before[1])
    assert torch.equal(weights_TK, torch.where(before[1] == 2, 0.0, before[0]))


@pytest.mark.parametrize("mode", MODES)
def test_the_plain_way_is_stock_mixtral_without_the_expert(mode: Mode, model: nn.Module, routed_base: Path) -> None:
    stock = without_expert(stock_model(routed_base), 1, 3, mode)
    with torch.no_grad():
        expected, before = stock(IDS).logits, model(IDS).logits
        with disabled_expert(model, 1, DisabledExpert(mode, 3)):
            torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=0)
        assert torch.equal(model(IDS).logits, before)
    assert (before - expected).abs().max() > 0.01


def test_masking_raises_the_weights_of_every_token_where_they_are_shares_of_all_experts() -> None:
    """As in a layer without the expert; where they sum to 1, only those of tokens that chose it change."""
    logits_TE = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    without_TE = logits_TE[:, 1:].softmax(-1)
    mask = DisabledExpert("mask", 0)
    routing = choose_experts(logits_TE, 2, normalises=False)
    weights_TK, index_TK = disabled_routing(logits_TE, *routing, mask, normalises=False)
    assert index_TK.tolist() == [[1, 2], [3, 2]]
    torch.testing.assert_close(weights_TK, without_TE.gather(1, index_TK - 1))
    assert (weights_TK[1] > routing[0][1]).all()
    routing = choose_experts(logits_TE, 2, normalises=True)
    weights_TK, index_TK = disabled_routing(logits_TE, *routing, mask, normalises=True)
    assert torch.equal(weights_TK[1], routing[0][1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_the_plain_way_in_other_families(family: str, mode: Mode, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path, family, num_experts=12, num_experts_per_tok=5, initializer_range=0.25)
    model = load_moe(base, quantization="none", dtype="float32").eval()
    stock = without_expert(stock_model(base), 1, 3, mode)
    with torch.no_grad(), disabled_expert(model, 1, DisabledExpert(mode, 3)):
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, atol=1e-4, rtol=0)


def test_a_tie_still_leaves_the_expert_out() -> None:
    logits_TE = torch.zeros(5, 4, dtype=torch.bfloat16)
    weights_TK, index_TK = disabled_routing(
        logits_TE,
        torch.full((5, 2), 0.5),
        torch.tensor([[0, 1]]).expand(5, 2),
        DisabledExpert("mask", 0),
        normalises=True,
    )
    assert not (index_TK == 0).any()
    assert torch.equal(weights_TK, torch.full((5, 2), 0.5))
    assert float(logits_TE.abs().max()) == 0  # the model's own tensor is as it was


def test_what_cannot_be_disabled_is_refused(model: nn.Module, tmp_path: Path) -> None:
    for layer, expert, message in ((3, 0, "layers 0 to 2"), (0, 4, "experts 0 to 3")):
        with pytest.raises(ValueError, match=message), disabled_expert(model, layer, DisabledExpert("zero", expert)):
            pass
    full = load_mixtral(save_tiny_mixtral(tmp_path, num_local_experts=2), quantization="none", dtype="float32")
    with pytest.raises(ValueError, match="already goes to 2 of the model's 2"):
        disabled_expert(full, 0, DisabledExpert("mask", 0)).__enter__()

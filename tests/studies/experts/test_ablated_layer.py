"""One layer without an expert, against the layer run whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.studies.experts.disabling import (
    MODES,
    AblatedLayer,
    DisabledExpert,
    disabled_expert,
    layer_arguments,
    output_cosines,
)

VARIANTS = [DisabledExpert(mode, expert) for mode in MODES for expert in range(4)]


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, routed_base: Path) -> Any:
    return load_mixtral(routed_base, dtype=request.param).eval()


@torch.no_grad()
def run(model: Any, hidden_BSH: Tensor, position_ids_BS: Tensor) -> AblatedLayer:
    arguments = layer_arguments(model, position_ids_BS)
    return AblatedLayer(model.model.layers[1], hidden_BSH, arguments, VARIANTS)


def test_the_layer_as_it_is_and_without_each_expert(model: Any) -> None:
    """In 16 bits too: products of as many rows, and the same order of sums."""
    dtype = model.model.norm.weight.dtype
    hidden_BSH = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions_BS = torch.cat([torch.arange(8), torch.arange(12)]).expand(3, 20)
    layer, arguments = run(model, hidden_BSH, positions_BS), layer_arguments(model, positions_BS)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        whole = model.model.layers[1](hidden_BSH, **arguments)
        torch.testing.assert_close(layer.output(), whole, atol=tolerance, rtol=0)
        for number, variant in enumerate(VARIANTS):
            with disabled_expert(model, 1, variant):
                expected = model.model.layers[1](hidden_BSH, **arguments)
            rows = torch.tensor([2, 0])
            torch.testing.assert_close(layer.output_without(number, rows), expected[rows], atol=tolerance, rtol=0)


def test_masking_computes_one_more_expert_for_each_token(model: Any) -> None:
    hidden_BSH = torch.randn(2, 20, 32).to(model.model.norm.weight.dtype)
    positions_BS = torch.arange(20).expand(2, 20)
    assert run(model, hidden_BSH, positions_BS).computed_rows == 40 * 3
    with torch.no_grad():
        arguments = layer_arguments(model, positions_BS)
        zero = [variant for variant in VARIANTS if variant.mode == "zero"]
        assert AblatedLayer(model.model.layers[1], hidden_BSH, arguments, zero).computed_rows == 40 * 2


def test_changed_rows_leave_padding_out(routed_base: Path) -> None:
    model: Any = load_mixtral(routed_base, quantization="none", dtype="float32").eval()
    layer = run(model, torch.randn(2, 20, 32), torch.arange(20).expand(2, 20))
    for number in range(len(VARIANTS)):
        tokens = layer.reroutes[number].tokens.tolist()
        real_BS = torch.ones(2, 20, dtype=torch.bool)
        assert layer.changed_rows(number, real_BS).tolist() == sorted({token // 20 for token in tokens})
        real_BS.view(-1)[[token for token in tokens if token < 20]] = False
        assert 0 not in layer.changed_rows(number, real_BS).tolist()


def test_output_cosines_of_a_zero_output_are_0(routed_base: Path) -> None:
    model: Any = load_mixtral(routed_base, quantization="none", dtype="float32").eval()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.storage.values[2] = 0
    with torch.no_grad():
        cosines_EE = output_cosines(experts, torch.randn(5, 32), 4) / 5
    torch.testing.assert_close(cosines_EE.diagonal(), torch.tensor([1.0, 1.0, 0.0, 1.0]).double())
    assert not cosines_EE[2].any()

"""What recomputation of a layer leaves out, and that whoever reads the experts' output gets it as it is."""

import os
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_mixcn import build_mixtral
from lightning_mixcn.model import set_activation_checkpointing
from lightning_mixcn.model.products import finish
from lightning_mixcn.testing import tiny_mixtral_config
from tests.model.trained_values import draw_trained

IDS = torch.randint(3, 200, (1, 8), generator=torch.Generator().manual_seed(2))


# A model in Triton's interpreter takes half a minute; test_fused.py has the block alone.
@pytest.fixture(params=["loop", "grouped", pytest.param("fused", marks=pytest.mark.slow)])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen: str = request.param
    if chosen == "fused":
        pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton's interpreter is off")
    monkeypatch.setenv("MIXCN_EXPERT_PATH", chosen)
    return chosen


def make_model(mode: str, dropout: float = 0.0) -> Any:
    lora = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
    model: Any = build_mixtral(tiny_mixtral_config(), dtype="float32", lora=lora).train()
    draw_trained(model, 0.1, seed=3, around_start=False)
    set_activation_checkpointing(model, mode)
    return model


def train(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model(input_ids=IDS, labels=IDS, output_router_logits=True).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def blocks_of(model: Any) -> list[Any]:
    return [module for layer in model.get_base_model().model.layers for module in (layer.mlp, layer.mlp.experts)]


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collect the outputs that are computed."""
    computed: list[Tensor] = []
    forward = finish._Finish.forward

    def spy(ctx: Any, pending: Tensor, compute: Any) -> Tensor:
        computed.append(forward(ctx, pending, compute))
        return computed[-1]

    monkeypatch.setattr(finish._Finish, "forward", spy)
    return computed


@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
def test_an_output_is_computed_once(mode: str, path: str, outputs: list[Tensor]) -> None:
    train(make_model(mode, 0.1))
    assert len(outputs) == 2  # layers


def test_gradients_of_whole_recomputation_are_the_same(path: str, outputs: list[Tensor]) -> None:
    found = train(make_model("full", 0.1))
    with set_checkpoint_early_stop(False):
        expected = train(make_model("full", 0.1))
    assert len(outputs) == 2 + 4
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("early_stop", [True, False])
def test_hooks_see_outputs_as_they_are(early_stop: bool, path: str) -> None:
    """Once, in forward; or in recomputation, too, where torch runs it to the end."""
    seen: dict[str, list[Tensor]] = {}
    for mode in ("none", "full"):
        model, seen[mode] = make_model(mode), []
        for block in blocks_of(model):
            block.register_forward_hook(lambda _, __, y, seen=seen[mode]: seen.append(y.detach().clone()))
        with set_checkpoint_early_stop(early_stop):
            train(model)
    assert len(seen["none"]) == 4
    again = [] if early_stop else seen["none"][2:] + seen["none"][:2]  # backward begins with the last layer
    assert len(seen["full"]) == 4 + len(again)
    assert all(torch.equal(*pair) for pair in zip(seen["full"], seen["none"] + again, strict=True))


def test_a_hook_that_computes_with_the_output(path: str, outputs: list[Tensor]) -> None:
    """Autograd saves the output for it, so that recomputation needs the output and makes it."""
    found = []
    for mode in ("none", "full"):
        model = make_model(mode)
        for block in blocks_of(model):
            block.register_forward_hook(lambda _, __, y: y * y.tanh())
        found.append(train(model))
    assert len(outputs) == 2 + 4
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_checkpoint_around_checkpoints(path: str) -> None:
    """The outer one needs the first layer's output for the second, the inner ones need none."""
    expected, model = train(make_model("none")), make_model("full")
    inner = model.get_base_model().model
    forward = inner.forward
    inner.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    found = train(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

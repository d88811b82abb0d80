"""Each routing decision is told once, whatever runs again in backward."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mixcn.model import load_mixtral, set_activation_checkpointing
from lightning_mixcn.model.experts.observe import is_recomputing, observe_routing


class Told(list[tuple[int, Tensor, Tensor, Tensor]]):
    """Keeps what the observer is told."""

    def __call__(self, layer: int, logits: Tensor, weights: Tensor, index: Tensor) -> None:
        self.append((layer, logits, weights, index))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_recognised(use_reentrant: bool) -> None:
    seen = []

    def double(x: Tensor) -> Tensor:
        seen.append(is_recomputing())
        # Its backward needs its input, or there would be no reason to compute it again.
        return x * x

    x = torch.ones(2, requires_grad=True)
    y: Any = checkpoint(double, x, use_reentrant=use_reentrant)
    assert not is_recomputing()
    y.sum().backward()
    assert seen == [False, True]
    assert not is_recomputing()


def model_of(tiny: Path, mode: str = "none") -> nn.Module:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "gate", "w1", "w2", "w3"])
    model = load_mixtral(tiny, dtype="float32", lora=lora).train()
    set_activation_checkpointing(model, mode)
    return model


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_every_layer_once_with_its_router_s_decisions(tiny: Path, ids: Tensor, mode: str) -> None:
    model, told = model_of(tiny, mode), Told()
    with observe_routing(model, told):
        out = model(input_ids=ids, labels=ids, output_router_logits=True)
        out.loss.backward()
    assert [layer for layer, *_ in told] == [0, 1]
    for (_, logits, weights, index), expected in zip(told, out.router_logits, strict=True):
        assert torch.equal(logits, expected)
        weight, chosen = torch.topk(expected.softmax(-1), 2)
        assert torch.equal(index, chosen)
        torch.testing.assert_close(weights, weight / weight.sum(-1, keepdim=True))


def test_checkpointing_does_run_the_routers_again(tiny: Path, ids: Tensor) -> None:
    """What the test above would not notice if it were otherwise."""
    model, calls = model_of(tiny, "full"), []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda *_: calls.append(is_recomputing()))
    model(input_ids=ids, labels=ids).loss.backward()
    assert calls == [False, False, True, True]


def test_the_observer_has_no_gradients_and_keeps_no_graph(tiny: Path, ids: Tensor) -> None:
    model, modes, kept = model_of(tiny), [], []

    def observe(layer: int, *tensors: Tensor) -> None:
        modes.append(torch.is_grad_enabled())
        kept.append(tensors)

    with observe_routing(model, observe):
        model(input_ids=ids, labels=ids, output_router_logits=True)
    assert modes == [False, False]
    assert all(tensor.grad_fn is None for tensors in kept for tensor in tensors)
    assert len(kept) == 2


def test_the_result_is_the_same(tiny: Path, ids: Tensor) -> None:
    model = model_of(tiny).eval()
    plain = model(input_ids=ids).logits
    with observe_routing(model, Told()):
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_after_the_end_nothing_is_told(tiny: Path, ids: Tensor) -> None:
    model, told = load_mixtral(tiny), Told()
    observation = observe_routing(model, told)
    observation.close()
    model(input_ids=ids)
    assert not told


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(ValueError, match="`model` is a Linear without a Router"):
        observe_routing(nn.Linear(1, 1), Told())


PROGRAM = """
import sys
import peft, torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from lightning_mixcn.model import load_mixtral, set_activation_checkpointing
from lightning_mixcn.model.experts.observe import observe_routing
base, meet, rank, ids = sys.argv[1], sys.argv[2], int(sys.argv[3]), torch.arange(3, 83).view(2, 40)
torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
model = load_mixtral(base, dtype="float32", lora=peft.LoraConfig(target_modules=["gate", "w1"])).train()
set_activation_checkpointing(model, "full")

def told():
    seen = []
    with observe_routing(model, lambda layer, logits, weights, index: seen.append((layer, index.clone()))):
        model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
    return seen

plain = told()
mesh = init_device_mesh("cpu", (2,))
for layer in model.base_model.model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
sharded = told()
assert [layer for layer, _ in sharded] == [0, 1]
assert all(torch.equal(index, other) for (_, index), (_, other) in zip(plain, sharded, strict=True))
torch.distributed.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_sharded_models_are_observed_alike(tiny: Path, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tiny), str(tmp_path / "meet"), str(rank)],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error

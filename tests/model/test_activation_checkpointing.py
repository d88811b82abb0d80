"""Recomputation changes memory, never numbers."""

from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from lightning_mixcn.model import activation_checkpointing, load_mixtral, set_activation_checkpointing
from lightning_mixcn.model.live_bytes import LiveBytes
from lightning_mixcn.model.routing_observation import observe_routing


def gradients(tiny: Path, ids: Tensor, mode: str | list[str], dropout: float) -> dict[str, Tensor]:
    lora = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    torch.manual_seed(3)
    model = load_mixtral(tiny, dtype="float32", lora=lora).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    set_activation_checkpointing(model, mode)
    torch.manual_seed(5)
    model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mode", ["selective", "full", "offload", ["full", "selective"], ["none", "offload"]])
def test_gradients_are_the_same(tiny: Path, ids: Tensor, mode: str | list[str], dropout: float) -> None:
    plain, again = gradients(tiny, ids, "none", dropout), gradients(tiny, ids, mode, dropout)
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


def test_full_keeps_less_than_selective_and_selective_less_than_none(tiny: Path, ids: Tensor) -> None:
    lora = peft.LoraConfig(r=4, target_modules="all-linear")
    model, kept = load_mixtral(tiny, dtype="float32", lora=lora).train(), {}
    for mode in ("none", "selective", "full"):
        set_activation_checkpointing(model, mode)
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, held: dict[int, int] = storages) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(input_ids=ids, labels=ids)
        kept[mode] = sum(storages.values())
        del out
    assert kept["full"] < kept["selective"] < kept["none"]


class NumpyCopy:
    """Stands in for the copy in a GPU's host: memory that torch knows nothing of."""

    def __init__(self, tensor: Tensor) -> None:
        self.values = tensor.numpy().copy()

    def fetch(self) -> Tensor:
        return torch.from_numpy(self.values)


def test_offload_keeps_no_input_of_a_layer(tiny: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with numpy for the host: numbers do not change, and the inputs are not torch's to keep."""
    plain = gradients(tiny, ids, "none", 0.2)
    hooks = partial(torch.autograd.graph.saved_tensors_hooks, NumpyCopy, NumpyCopy.fetch)
    monkeypatch.setattr(activation_checkpointing, "kept_on_host", hooks)
    monkeypatch.setattr(activation_checkpointing, "_on_gpu", lambda _: True)
    offloaded = gradients(tiny, ids, "offload", 0.2)
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
    model, kept = load_mixtral(tiny, dtype="float32", lora=peft.LoraConfig(target_modules="all-linear")).train(), {}
    for mode in ("full", "offload"):
        set_activation_checkpointing(model, mode)
        with LiveBytes() as live:
            loss = model(input_ids=ids, labels=ids).loss
            kept[mode] = live.now
        del loss
    assert kept["full"] - kept["offload"] == 2 * ids.numel() * 32 * 4  # layers, tokens, width, float32


@pytest.mark.parametrize("mode", ["offload", ["full", "none"]])
def test_routing_is_observed_once(tiny: Path, ids: Tensor, mode: str | list[str]) -> None:
    model = load_mixtral(tiny, dtype="float32", lora=peft.LoraConfig(target_modules="all-linear")).train()
    set_activation_checkpointing(model, mode)
    seen: list[int] = []
    with observe_routing(model, lambda layer, *_: seen.append(layer)):
        model(input_ids=ids, labels=ids).loss.backward()
    assert seen == [0, 1]


def test_switching_off_again(tiny: Path, ids: Tensor) -> None:
    model = load_mixtral(tiny)
    set_activation_checkpointing(model, "full")
    set_activation_checkpointing(model, "none")
    assert not any("forward" in vars(module) for module in model.modules())


def test_unknown_mode(tiny: Path) -> None:
    with pytest.raises(ValueError, match="none, selective, full, offload"):
        set_activation_checkpointing(load_mixtral(tiny), "some")
    with pytest.raises(ValueError, match="1 modes for 2 layers"):
        set_activation_checkpointing(load_mixtral(tiny), ["full"])

"""Recomputation changes memory, never numbers."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from lightning_mixcn.model import load_mixtral, set_activation_checkpointing


def gradients(tiny: Path, ids: Tensor, mode: str, dropout: float) -> dict[str, Tensor]:
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
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_the_same(tiny: Path, ids: Tensor, mode: str, dropout: float) -> None:
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


def test_switching_off_again(tiny: Path, ids: Tensor) -> None:
    model = load_mixtral(tiny)
    set_activation_checkpointing(model, "full")
    set_activation_checkpointing(model, "none")
    assert not any("forward" in vars(module) for module in model.modules())


def test_unknown_mode(tiny: Path) -> None:
    with pytest.raises(ValueError, match="none, selective, full"):
        set_activation_checkpointing(load_mixtral(tiny), "some")

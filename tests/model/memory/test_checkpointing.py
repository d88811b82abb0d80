"""Recomputation changes memory, never numbers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from lightning_mixcn import build_mixtral
from lightning_mixcn.model import load_mixtral, set_activation_checkpointing
from lightning_mixcn.model.causal_lm import CACHE_ARGUMENT
from lightning_mixcn.model.experts.observe import observe_routing
from lightning_mixcn.model.memory import checkpointing as activation_checkpointing
from lightning_mixcn.model.memory.checkpointing import HostCopy, kept_on_host
from lightning_mixcn.model.memory.optimizer import MemoryTracker
from lightning_mixcn.testing import random_batch, tiny_mixtral_config

MODES: list[str | list[str]] = ["selective", "full", "offload", ["full", "selective"], ["none", "offload"]]


def gradients(
    tiny: Path, ids: Tensor, mode: str | list[str], dropout: float, attention_dropout: float = 0.0
) -> dict[str, Tensor]:
    lora = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    torch.manual_seed(3)
    model: Any = load_mixtral(tiny, dtype="float32", lora=lora, device=ids.device).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = attention_dropout
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    set_activation_checkpointing(model, mode)
    torch.manual_seed(5)
    model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same(tiny: Path, ids: Tensor, mode: str | list[str], dropout: float) -> None:
    plain, again = gradients(tiny, ids, "none", dropout), gradients(tiny, ids, mode, dropout)
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


class DeviceGenerator:
    """Stands in for a GPU's random numbers: `checkpoint` keeps their state for devices of positional tensors only.

    See "preserve_rng_state" in https://docs.pytorch.org/docs/stable/checkpoint.html.
    """

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        assert not inplace
        if not training or p == 0.0:
            return x
        return x * (torch.rand(x.shape, generator=self.generator) >= p).to(x.dtype) / (1 - p)

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kept = [self.generator.get_state()] if any(isinstance(value, Tensor) for value in args) else []
        calls = 0

        def run(*values: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1 or not kept:
                return function(*values, **named)
            present = self.generator.get_state()
            self.generator.set_state(kept[0])
            try:
                return function(*values, **named)
            finally:
                self.generator.set_state(present)

        return torch.utils.checkpoint.checkpoint(run, *args, **kwargs)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_of_a_device_is_the_same_when_it_is_computed_again(
    mode: str | list[str], tiny: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for chosen in ("none", mode):
        device = DeviceGenerator()
        monkeypatch.setattr(activation_checkpointing, "checkpoint", device.checkpoint)
        monkeypatch.setattr(torch.nn.functional, "dropout", device.dropout)
        found.append(gradients(tiny, ids, chosen, 0.2))
    plain, again = found
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("adapted", [True, False])
def test_every_checkpoint_gets_a_positional_tensor(
    mode: str | list[str], quantization: Any, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a packed row with documents, and in plain rows; of a PeftModel and of a model whose embeddings train."""
    lora = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1) if adapted else None
    model: Any = build_mixtral(tiny_mixtral_config(), quantization=quantization, lora=lora, train_embeddings=True)
    set_activation_checkpointing(model.train(), mode)
    positional = []

    def spy(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        positional.append([value for value in args if isinstance(value, Tensor)])
        return torch.utils.checkpoint.checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(activation_checkpointing, "checkpoint", spy)
    batch = random_batch([24, 20])
    names = ("input_ids", "labels", "position_ids", "document_ids")
    model(**{name: batch[name] for name in names}, output_router_logits=True, use_cache=False).loss.backward()
    model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    layers = sum(chosen != "none" for chosen in activation_checkpointing.layer_modes(mode, 2))
    assert len(positional) == 2 * layers
    assert all(positional)


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_is_not_filled_again_by_backward(tiny: Path, ids: Tensor, mode: str | list[str]) -> None:
    model: Any = load_mixtral(tiny, dtype="float32", lora=peft.LoraConfig(target_modules="all-linear")).train()
    set_activation_checkpointing(model, mode)
    cache = DynamicCache()
    model(input_ids=ids, **{CACHE_ARGUMENT: cache}).logits.sum().backward()
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.gpu
@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_on_a_gpu_are_the_same(
    mode: str | list[str], attention_dropout: float, tiny: Path, ids: Tensor
) -> None:
    ids = ids.cuda()
    plain = gradients(tiny, ids, "none", 0.2, attention_dropout)
    again = gradients(tiny, ids, mode, 0.2, attention_dropout)
    assert plain.keys() == again.keys()
    for name in plain:
        # Scattered sums of a GPU have no fixed order; other masks differ by half of the norm and more.
        difference = (plain[name] - again[name]).norm() / plain[name].norm()
        assert difference <= 1e-4, name


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
        with MemoryTracker() as live:
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


@pytest.mark.gpu
def test_it_comes_back_as_it_was() -> None:
    """The tensor is overwritten right after, as its memory would be."""
    for _ in range(20):
        tensor = torch.randn(4096, 1024, device="cuda")
        expected, copy = tensor.clone(), HostCopy(tensor)
        del tensor
        torch.full((4096, 1024), -1.0, device="cuda")
        assert torch.equal(copy.fetch(), expected)


@pytest.mark.gpu
def test_autograd_keeps_nothing_on_the_gpu() -> None:
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    with kept_on_host():
        y = (x * 2).exp()
    before = torch.cuda.memory_allocated()
    loss = y.sum()
    del y
    assert torch.cuda.memory_allocated() < before
    loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * (x * 2).exp().detach())

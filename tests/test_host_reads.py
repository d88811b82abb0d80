"""What a micro-batch does, apart from its experts, never waits for the device.

On the meta device tensors have no values, so whatever would read one (`item`, `tolist`, a mask as index, `nonzero`) is
an error: what runs there enqueues its work on a GPU and goes on. Only a number that the host makes and copies to the
device would pass; those the tests on a GPU find.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from lightning_mixcn import build_mixtral
from lightning_mixcn.callbacks import DataMonitor, RunFacts, ThroughputLogger
from lightning_mixcn.callbacks.clocks import StepClock
from lightning_mixcn.callbacks.expert_load.window import LoadWindow
from lightning_mixcn.model import set_activation_checkpointing
from lightning_mixcn.model.attention import documents as attention
from lightning_mixcn.model.attention.packed import PackedDocuments
from lightning_mixcn.model.experts.block import Experts
from lightning_mixcn.model.experts.observe import observe_routing
from lightning_mixcn.model.lora.trainability import GradientArrivals
from lightning_mixcn.modules import CausalLMModule, InstructModule, PretrainModule
from lightning_mixcn.testing import random_batch, tiny_mixtral_config

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]
Batch = dict[str, Tensor]


def batch_on(device: str) -> Batch:
    return {name: value.to(device) for name, value in random_batch([24, 13], sources=2).items()}


def without_experts(self: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Experts learn from the host how many rows each has; their own tests say how often they ask."""
    weighted: Tensor = hidden * weights.sum(1, keepdim=True).to(hidden.dtype)
    return weighted


def module_on(device: str, kind: type[CausalLMModule], checkpointing: str, **settings: Any) -> Any:
    module: Any = kind("nowhere", **settings)
    module.model = build_mixtral(
        tiny_mixtral_config(),
        lora=LoraConfig(r=4, lora_dropout=0.1, target_modules=TARGETS),
        train_embeddings=True,
        device=device,
    )
    set_activation_checkpointing(module.model, checkpointing)
    module.model.train()
    module.trainer = SimpleNamespace(accumulate_grad_batches=2)
    return module


def train(module: Any, batch: Batch, watched: Callable[[Any, Batch], None]) -> None:
    """Run a micro-batch as the training loop does, with the callbacks that look at each one."""
    window = LoadWindow(["zh", "en"], [8], 2, 4, batch["labels"].device)
    arrivals = GradientArrivals(module.model)
    arrivals.counting = True
    with observe_routing(module.model, window.observe):
        window.open_batch(batch)
        loss = module.training_step(batch, 0)
        window.close_batch()
        loss.backward()
    assert len(arrivals.take()) == 2
    arrivals.close()
    watched(module, batch)


def watched(module: Any, batch: Batch) -> None:
    """End a micro-batch that ends no optimizer step."""
    trainer: Any = SimpleNamespace(global_step=3, log_every_n_steps=7)
    speed: Any = ThroughputLogger()
    speed._sliding_window = speed._work = None
    speed._phases = SimpleNamespace(mark=lambda phase: None)  # has tests of its own
    data = DataMonitor()
    data._names = ["zh", "en"]
    facts: Any = RunFacts()
    facts._piece_bytes = torch.ones(500, dtype=torch.int64, device=batch["labels"].device)
    clock: Any = StepClock()
    clock._step = 3
    for callback in (clock, speed, data, facts):
        callback.on_train_batch_end(trainer, module, None, batch, 0)
    assert speed._work is not None
    assert clock.tokens is not None
    assert facts._seen is not None
    assert data._counts is not None


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without experts, and with the offsets of documents as one read a batch has found them."""
    offsets = torch.tensor([0, 24, 37, 48], dtype=torch.int32, device="meta")
    monkeypatch.setattr(attention, "locate_documents", lambda *_: PackedDocuments(offsets, 24))
    monkeypatch.setattr(Experts, "forward", without_experts)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_micro_batch_of_pretraining(checkpointing: str) -> None:
    module = module_on("meta", PretrainModule, checkpointing)
    train(module, batch_on("meta"), watched)
    trained = {name: parameter for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if parameter.grad is None and ".experts." not in name]
    assert not missing


@pytest.mark.usefixtures("unread")
def test_a_micro_batch_of_instruction_tuning() -> None:
    module = module_on("meta", InstructModule, "selective", loss_weighting="conversation")
    train(module, batch_on("meta"), watched)


def test_the_meta_device_has_no_values() -> None:
    """What the tests above rest on."""
    values = torch.ones(1, device="meta")
    for read in (Tensor.tolist, float, Tensor.nonzero, Tensor.cpu, torch.bincount, lambda value: value[value > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(values)


def test_what_the_progress_bar_shows_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning reads it after each micro-batch."""
    module, logged = module_on("meta", PretrainModule, "none"), {}
    module.log = lambda name, value, **_: logged.update({name: value})
    module.tokens_of_step = 96.0
    ticks = iter([0.0, 10.0, 12.0])
    monkeypatch.setattr("lightning_mixcn.callbacks.clocks.perf_counter", lambda: next(ticks))
    clock, trainer = StepClock(), SimpleNamespace(global_step=0)
    clock.on_train_start(trainer, module)  # type: ignore[arg-type]  # a stand-in
    clock.on_train_batch_start(trainer, module, None, 0)  # type: ignore[arg-type]  # a stand-in
    trainer.global_step = 1
    clock.on_train_batch_end(trainer, module, None, batch_on("meta"), 0)  # type: ignore[arg-type]  # a stand-in
    assert logged["throughput/tokens_per_second"].device.type == "cpu"
    assert float(logged["throughput/tokens_per_second"]) == 48.0


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_micro_batch_on_a_gpu(checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = module_on("cuda", PretrainModule, checkpointing), batch_on("cuda")
    documents = attention.locate_documents(batch["position_ids"], module.model.config, torch.bfloat16)
    monkeypatch.setattr(attention, "locate_documents", lambda *_: documents)
    monkeypatch.setattr(Experts, "forward", without_experts)
    train(module, batch, watched)  # the first call loads libraries, which waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(module, batch, watched)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_documents_are_found_with_one_wait() -> None:
    batch, config = batch_on("cuda"), tiny_mixtral_config()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="called a synchronizing CUDA operation") as waits:
            attention.locate_documents(batch["position_ids"], config, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1

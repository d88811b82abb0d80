"""A training run that gives the same numbers under every strategy, for `run_distributed`."""

import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from lightning_mixcn.callbacks import ExpertLoadMonitor, StepCheckpoint, TrainabilityCheck
from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.model import (
    MoePeftModel,
    load_mixtral,
    local_bytes,
    shard_model,
)
from lightning_mixcn.model.experts.block import Router
from lightning_mixcn.model.lora.attach import stored_adapter
from lightning_mixcn.model.sharding import full_tensor
from lightning_mixcn.modules import FSDP2Strategy, PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch
from lightning_mixcn.text import Source

MICRO_BATCHES = 8  # of a step, on all ranks together
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]


def strategy(name: str) -> Strategy | str:
    made: dict[str, Callable[[], Strategy | str]] = {
        "one": lambda: "auto",
        "ddp": lambda: "ddp",
        "fsdp": lambda: "fsdp",
        "fsdp2": FSDP2Strategy,
        "hsdp": lambda: FSDP2Strategy(shard_size=2, reshard_after_forward=False),
        "plain": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        "one file": lambda: FSDP2Strategy(save_distributed_checkpoint=False),
    }
    return made[name]()


class SharedBatches(FixedBatches):
    """Micro-batch j of a rank is micro-batch ``j * ranks + rank`` of all."""

    def _loader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        mine = self.batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset, too

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


class Losses(Callback):
    """Keeps each step's loss, and which experts a rank's tokens reached in the first step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.reached: list[set[int]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        for module in pl_module.modules():
            if isinstance(module, Router):
                self.reached.append(set())
                module.register_forward_hook(self._keep(self.reached[-1], trainer))

    @staticmethod
    def _keep(reached: set[int], trainer: Trainer) -> Any:
        def hook(module: Any, inputs: Any, outputs: Any) -> None:
            if trainer.global_step == 0:
                reached.update(outputs[2].flatten().tolist())

        return hook

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def batches(sources: int = 1) -> list[dict[str, torch.Tensor]]:
    """Rows of very different lengths; those of the last of four ranks are one token, which reaches two experts.

    Row i is of source i modulo ``sources``.
    """
    lengths = [1 if row % 4 == 3 else 2 + (5 * row) % 23 for row in range(MICRO_BATCHES * 3)]
    made = [random_batch([length], seed=row) for row, length in enumerate(lengths)]
    for row, batch in enumerate(made):
        batch["source_ids"] = torch.where(batch["document_ids"] >= 0, row % sources, -1).short()
    return made


def text(base: str, path: str) -> PretrainDataModule:
    """Rows of a text, one a micro-batch, the same in each step for any number of ranks."""
    return PretrainDataModule(
        [Source("zh", path)], tokenizer=base, sequence_length=48, micro_batch_size=1, num_streams=8,
        num_workers=0, val_fraction=0.0,
    )  # fmt: skip


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    return LoraConfig(**(settings | changes))


def module(base: str, **changes: Any) -> PretrainModule:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "lora": lora(),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        # A schedule's length would be another in a run that is cut short.
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    }
    return PretrainModule(base, **(settings | changes))


def train(names: list[str], base: str, out: str, **changes: Any) -> dict[str, dict[str, Any]]:
    """Train under each strategy in turn."""
    return {name: _train(name, base, str(Path(out, name)), **changes) for name in names}


def _train(
    name: str,
    base: str,
    out: str,
    *,
    max_steps: int = 8,
    ckpt_path: str | None = None,
    path: str | None = None,
    checkpoints: str | None = None,
    sources: tuple[str, ...] = ("zh",),
    **changes: Any,
) -> dict[str, Any]:
    ranks = torch.distributed.get_world_size()
    model, losses, started = module(base, **changes), Losses(), time.perf_counter()
    saving = [] if checkpoints is None else [StepCheckpoint(every_n_steps=2, keep=9, dirpath=checkpoints)]
    accelerator = "gpu" if torch.distributed.get_backend() == "nccl" else "cpu"
    trainer = Trainer(
        accelerator=accelerator, devices=ranks, strategy=strategy(name), max_steps=max_steps, max_epochs=-1,
        accumulate_grad_batches=MICRO_BATCHES // ranks, use_distributed_sampler=False, gradient_clip_val=0.1,
        logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=out,
        enable_checkpointing=bool(saving), callbacks=[losses, ExpertLoadMonitor(), TrainabilityCheck(), *saving],
    )  # fmt: skip
    data = SharedBatches(batches(len(sources)), sources) if path is None else text(base, path)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    assert isinstance(model.model, MoePeftModel)
    factors, embeddings = stored_adapter(model.model)
    return {
        "losses": losses.losses,
        "settings": {key: value for key, value in trainer.optimizers[0].param_groups[0].items() if key != "params"},
        "rates": rates(model, trainer),
        "reached": losses.reached,
        "experts": Path(out, "experts.csv").read_text(encoding="utf-8") if trainer.is_global_zero else None,
        "adapter": {
            f"{name} {part}": value
            for name, pair in factors.items()
            for part, value in zip("AB", pair[:2], strict=True)
        }
        | embeddings,
        "base": _digest(model.model),
        "bytes": local_bytes(model.model),
        "seconds": time.perf_counter() - started,
    }


def rates(model: LightningModule, trainer: Trainer) -> dict[str, float]:
    """Return the learning rate that the optimizer has for each tensor that trains."""
    (optimizer,) = trainer.optimizers
    of = {parameter: group["initial_lr"] for group in optimizer.param_groups for parameter in group["params"]}
    return {name: of[parameter] for name, parameter in model.named_parameters() if parameter.requires_grad}


def shares(base: str, sizes: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    """Return the contents of a rank after sharded loading, for each shape of the mesh."""
    found = []
    for shape in sizes:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        model = load_mixtral(
            base,
            lora=LoraConfig(r=8, target_modules=TARGETS),
            train_embeddings=True,
            shard=partial(shard_model, mesh=mesh),
        )
        assert isinstance(model, torch.nn.Module)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append({"bytes": local_bytes(model), "base": _digest(model), "adapter": _sums(trained)})
    return found


def _sums(parameters: list[torch.nn.Parameter]) -> list[float]:
    return [float(full_tensor(parameter).double().sum()) for parameter in parameters]


def _digest(model: torch.nn.Module) -> str:
    frozen = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            frozen.update(full_tensor(parameter).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return frozen.hexdigest()

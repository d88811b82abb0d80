"""How fast training is, of what is possible, and where its time and memory go."""

from collections.abc import Mapping
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_mixcn.arguments import Steps, check_arguments
from lightning_mixcn.metrics.device import peak_rate
from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.model.memory.flops import TrainingFlops, attended_pairs, count_training_flops

from .clocks import PhaseClock, step_clock
from .host import causal_lm

_PHASES = ("forward", "backward", "optimizer")


class ThroughputLogger(Callback):
    """Logs under ``throughput/`` the speed since its last log, beside ``tokens_per_second`` of each step.

    Validation is left out, callbacks and checkpoints are not. ``tokens_per_second_per_device`` counts tokens without
    padding. ``teraflops_per_second_per_device`` are the operations that they need, forward and backward, without
    recomputation; ``fraction_of_peak`` is their share of what the device can do (``peak_teraflops_per_second``: its
    maker's figure, or where that is not known measured once), ``fraction_of_peak_with_recompute`` counts all that is
    executed, of which ``recompute_share`` is recomputation. ``seconds_per_step`` consists of ``seconds_data`` (waiting
    for batches), ``seconds_forward``, ``seconds_backward``, ``seconds_optimizer`` (the update, with the reductions
    before it) and ``seconds_other`` (callbacks, copies, logging), each a mean over steps and ranks. On CUDA the three
    in the middle are the device's time, read from events when this logs and not before; a batch may be waited for
    while the device still works, so their sum can be larger, and ``seconds_other`` is then 0. Memory is that of the
    fullest rank in GiB: ``host_resident_gib``, and on CUDA ``allocated_gib``, ``reserved_gib`` and
    ``peak_allocated_gib``. ``seconds_left`` of the run is an estimate from all of it so far.

    Args:
        every_n_steps: Optimizer steps between logs, over which each figure is a mean.
    """

    def __init__(self, every_n_steps: Steps = 10) -> None:
        check_arguments(ThroughputLogger, locals())
        self.every_n_steps = every_n_steps
        self._flops: TrainingFlops | None = None
        self._work: Tensor | None = None  # of this rank since the last log: tokens and attended pairs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module, and find the run's clock."""
        causal_lm(self, pl_module)
        if stage == "fit":
            self._clock = step_clock(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the model's operations and know the device's peak before the first window opens."""
        module = causal_lm(self, pl_module)
        assert module.model is not None
        self._flops = count_training_flops(module.model, module.activation_checkpointing)
        self._sliding_window = getattr(base_of(module.model).config, "sliding_window", None)
        self._peak = peak_rate(module.device, getattr(torch, module.dtype_name)).flops_per_second
        self._phases = PhaseClock(module.device)
        self._work, self._logged_at = None, trainer.global_step
        self._window_start, self._waited = self._clock.seconds, self._clock.waited_seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the forward pass."""
        self._phases.mark("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """End it."""
        self._phases.mark("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the update, which is all that follows in a micro-batch."""
        self._phases.mark("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        """Count the micro-batch on the device, and log where a step ended that is a multiple of ``every_n_steps``."""
        self._phases.mark("other")
        documents_BS = batch["document_ids"]
        pairs = attended_pairs(batch["position_ids"], documents_BS, self._sliding_window)
        work = torch.stack([(documents_BS >= 0).sum(), pairs])
        self._work = work if self._work is None else self._work + work
        step = trainer.global_step
        # Micro-batches of the next step still see this step's number.
        if step % self.every_n_steps == 0 and step != self._logged_at:
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the window on all ranks, open the next one, and write to the loggers."""
        steps, self._logged_at = trainer.global_step - self._logged_at, trainer.global_step
        seconds = self._seconds()
        assert self._work is not None
        own = torch.cat([self._work.double().cpu(), torch.tensor([*seconds.values()], dtype=torch.float64)])
        self._work = None
        root = trainer.strategy.root_device
        tokens, pairs, *summed = trainer.strategy.reduce(own.to(root), reduce_op="sum").tolist()
        memory = _memory(root)
        fullest = trainer.strategy.reduce(torch.tensor([*memory.values()], device=root), reduce_op="max").tolist()
        ranks = trainer.world_size
        mean = {name: value / ranks for name, value in zip(seconds, summed, strict=True)}
        values = self._speed(tokens / ranks, pairs / ranks, mean["per_step"])
        values |= {f"seconds_{name}": value / steps for name, value in mean.items()}
        values |= dict(zip(memory, fullest, strict=True))
        if (left := self._clock.seconds_left(trainer)) is not None:
            values["seconds_left"] = left
        for logger in trainer.loggers:
            # Lightning numbers steps from 0 in its logs.
            logger.log_metrics(
                {f"throughput/{name}": value for name, value in values.items()}, step=trainer.global_step - 1
            )

    def _seconds(self) -> dict[str, float]:
        """Return this rank's seconds since the last log: all of them as ``per_step``, and its parts."""
        phases = self._phases.take()
        now, waited = self._clock.seconds, self._clock.waited_seconds
        elapsed, self._window_start = now - self._window_start, now
        parts = {"data": waited - self._waited} | {name: phases.get(name, 0.0) for name in _PHASES}
        self._waited = waited
        return {"per_step": elapsed} | parts | {"other": max(0.0, elapsed - sum(parts.values()))}

    def _speed(self, tokens: float, pairs: float, seconds: float) -> dict[str, float]:
        """Return the rates of one device from its work in ``seconds``."""
        assert self._flops is not None
        flops = self._flops.of(round(tokens), round(pairs))
        return {
            "tokens_per_second_per_device": tokens / seconds,
            "teraflops_per_second_per_device": flops.useful / seconds / 1e12,
            "fraction_of_peak": flops.useful / seconds / self._peak,
            "fraction_of_peak_with_recompute": flops.total / seconds / self._peak,
            "recompute_share": flops.recompute / max(1, flops.total),
            "peak_teraflops_per_second": self._peak / 1e12,
        }


def _memory(device: torch.device) -> dict[str, float]:
    """Return the GiB in use by this process; ``peak`` is since its start."""
    gib = {"host_resident_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        gib |= {
            "allocated_gib": torch.cuda.memory_allocated(device) / 2**30,
            "reserved_gib": torch.cuda.memory_reserved(device) / 2**30,
            "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        }
    return gib

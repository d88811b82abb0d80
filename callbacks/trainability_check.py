"""Proof, while a run starts, that what should train does and that nothing else changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_mixcn.model.causal_lm import base_of, verify_quantised
from lightning_mixcn.model.experts.block import Experts
from lightning_mixcn.model.lora.trainability import (
    GradientArrivals,
    TrainedTensor,
    fingerprints,
    nonzero_groups,
    trained_tensors,
)

from .host import causal_lm

# After the first steps, experts that still wait for a token are looked at now and then only.
_FIRST_STEPS, _LATER_EVERY_N_STEPS = 10, 100


class TrainabilityCheck(Callback):
    """Stops a run, naming the parameters, that would not train what it should, or would change what it should not.

    At the start: under ``quantization: nf4`` every expert and attention projection is in 4 bits, and bytes are within
    2 % of the plan. Before the first update: the optimizer has every factor of the adapters, and trained embeddings.
    Then every LoRA B, expert by expert, has a non-zero gradient on some rank in the first step in which a gradient
    comes back to one of the expert's tokens, and every A in the first such step after its B became non-zero; that
    gradients are finite, the module checks itself. Experts without any such token are looked at again, and named in a
    warning when training ends. After the first step and at the end: no frozen parameter has changed.

    Frozen parameters are read three times in a run, and gradients in the steps that prove something: mostly two.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[TrainedTensor, list[int]]] = []
        self._frozen: dict[str, Tensor] = {}
        self._fingerprints: Tensor | None = None
        self._arrivals: GradientArrivals | None = None
        self._started_at = 0
        self._checked_at: int | None = None  # the step up to which frozen parameters are known to be what they were

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module."""
        causal_lm(self, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check 4 bits and note what is frozen. FSDP2 has sharded the parameters now, and has gathered none yet."""
        module = causal_lm(self, pl_module)
        assert module.model is not None
        if module.quantization == "nf4":
            base: Any = base_of(module.model)
            verify_quantised(base, base.config)
        trained = list(trained_tensors(module.model, module.train_embeddings))
        self._pending = [(tensor, list(range(len(tensor.names)))) for tensor in trained]
        known = {id(tensor.parameter) for tensor in trained}
        self._frozen = {
            name: parameter
            for name, parameter in module.model.named_parameters()
            if not parameter.requires_grad and id(parameter) not in known
        }
        self._fingerprints = fingerprints(self._frozen.values())
        self._arrivals = GradientArrivals(module.model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the first step, which is another one in a resumed run."""
        self._started_at = self._checked_at = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the gradients of a step that will be looked at."""
        if self._arrivals is not None:
            self._arrivals.counting = self._looks_at(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients of a step, those of all ranks. Raises: RuntimeError; nothing is updated."""
        step = trainer.global_step
        if step == self._started_at:
            self._check_optimizer(optimizer)
        if self._arrivals is None or not self._looks_at(step):
            return
        arrivals = self._arrivals.take()
        own = [_evidence(tensor, arrivals, trainer.strategy.root_device) for tensor, _ in self._pending]
        summed = trainer.strategy.reduce(torch.cat(own, dim=1), reduce_op="sum").cpu()
        untrained: list[str] = []
        pending = []
        shares = summed.split([part.shape[1] for part in own], dim=1)
        for (tensor, groups), evidence in zip(self._pending, shares, strict=True):
            has_gradient, is_nonzero, *conditions = evidence > 0
            is_due = ~has_gradient | torch.stack(conditions).all(0)
            left = [group for group in groups if not is_nonzero[group]]
            untrained += [tensor.names[group] for group in left if is_due[group]]
            if left:
                pending.append((tensor, left))
        if untrained:
            raise RuntimeError(
                f"Optimizer step {step} (from 0) has no gradient for {_some(untrained)}, which should train; nothing "
                "was updated in this step. Look for a frozen or detached part of the model, e.g. in a subclass"
            )
        self._pending = pending
        if not pending:
            self._stop_watching()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at what is frozen after the first step."""
        # Micro-batches of the next step still see this step's number.
        if trainer.global_step == self._started_at + 1 and self._checked_at == self._started_at:
            self._check_frozen(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what is frozen once more, and name what could not be checked."""
        self._stop_watching()
        if trainer.global_step == self._started_at:
            return
        if trainer.global_step != self._checked_at:
            self._check_frozen(trainer)
        waiting = [tensor.names[group] for tensor, groups in self._pending for group in groups if tensor.after is None]
        if waiting:
            rank_zero_warn(
                f"TrainabilityCheck: no gradient has come back to {_some(waiting)}, for want of tokens: whether they "
                "train is not known"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks and let go of the parameters."""
        self._stop_watching()
        self._pending, self._frozen, self._fingerprints = [], {}, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self.teardown(trainer, pl_module, "fit")

    def _looks_at(self, step: int) -> bool:
        """Return whether a step is one to look at; the same on every rank."""
        if not self._pending:
            return False
        return step - self._started_at < _FIRST_STEPS or step % _LATER_EVERY_N_STEPS == 0

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for tensor, _ in self._pending if id(tensor.parameter) not in held for name in tensor.names]
        if missing:
            raise RuntimeError(
                f"The optimizer does not have {_some(missing)}, which should train. Make it from all parameters "
                "that require gradients, and set requires_grad for none of these to false"
            )

    def _check_frozen(self, trainer: Trainer) -> None:
        """Compare what each rank holds. Raises: RuntimeError, on all ranks."""
        assert self._fingerprints is not None
        self._checked_at = trainer.global_step
        changed = (fingerprints(self._frozen.values()) != self._fingerprints).long().to(trainer.strategy.root_device)
        flags = trainer.strategy.reduce(changed, reduce_op="sum").tolist()
        names = [name for name, flag in zip(self._frozen, flags, strict=True) if flag]
        if names:
            raise RuntimeError(
                f"{_some(names)} changed up to optimizer step {trainer.global_step}, though frozen. Something writes "
                "to the base: look at callbacks and subclasses, and do not use this run's checkpoints"
            )

    def _stop_watching(self) -> None:
        if self._arrivals is not None:
            self._arrivals.close()
            self._arrivals = None


def _evidence(tensor: TrainedTensor, arrivals: Mapping[Experts, Tensor], device: torch.device) -> Tensor:
    """Count on this rank, ``[4, G]`` int64: a gradient; a non-zero one; tokens that it came back to; a non-zero B."""
    count = len(tensor.names)
    gradient = tensor.parameter.grad
    arrived = ones = torch.ones(count, dtype=torch.int64, device=device)
    if tensor.experts is not None:
        arrived = arrivals[tensor.experts][list(tensor.numbers)] if tensor.experts in arrivals else ones * 0
    return torch.stack(
        [
            ones if gradient is not None else ones * 0,
            nonzero_groups(gradient, count) if gradient is not None else ones * 0,
            arrived,
            ones if tensor.after is None else nonzero_groups(tensor.after, count),
        ]
    )


def _some(names: Sequence[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{rest}"

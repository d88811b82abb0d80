"""Gradients of an optimizer step whose micro-batches hold different numbers of tokens.

Lightning averages losses over micro-batches and gradients over ranks. With uneven token counts neither average is the
mean over the step's tokens. So every micro-batch contributes a *sum*, over a constant; when the last gradient has
arrived, the sums of counts over micro-batches and ranks are known and the gradients are rescaled once.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mixcn.errors import UserError

# Keeps gradients near their size for a mean. A power of two, so that dividing by it is exact.
REFERENCE_COUNT = 1024.0


@dataclass(frozen=True)
class Contribution:
    """Sums that one micro-batch adds to an optimizer step, or those of all of them.

    Args:
        minimised: Sum that is minimised, the auxiliary loss included.
        count: Divisor of ``minimised`` in the end.
        nats: Sum of the negative log-likelihood.
        auxiliary: Auxiliary load-balancing loss times ``labels``.
        labels: Number of predicted tokens.
        positions: Number of tokens that went through the model, without padding.
        divergence: Sum of KL(base ‖ model), where `kl_to_base` is given, before its coefficient.
        compared: Number of tokens in ``divergence``.
    """

    minimised: Tensor
    count: Tensor
    nats: Tensor
    auxiliary: Tensor
    labels: Tensor
    positions: Tensor
    divergence: Tensor
    compared: Tensor


class GradientWindow:
    """Sums over the micro-batches of one optimizer step."""

    def __init__(self) -> None:
        """Open an empty window."""
        self._sums: Tensor | None = None

    def add(self, contribution: Contribution) -> None:
        """Add one micro-batch; its tensors are scalars of any dtype on one device."""
        # float64 is exact for counts up to 2⁵³, so one vector, and one reduction, holds counts and sums.
        parts = [torch.as_tensor(value).detach().double() for value in vars(contribution).values()]
        sums = torch.stack(parts)
        self._sums = sums if self._sums is None else self._sums + sums

    def close(self, strategy: Any) -> Contribution:
        """Return the totals over micro-batches and ranks, and open an empty window.

        Args:
            strategy: Lightning's strategy, whose ``reduce`` adds over ranks; called once on every rank.

        Returns:
            Scalars, float64, on the CPU: reading them waits for the device once a step.

        Raises:
            ValueError: no micro-batch was added, which a ``training_step`` that does not call its parent's causes.
        """
        if self._sums is None:
            raise UserError(
                "The optimizer step got no micro-batch. A subclass that overrides `training_step` must return "
                "`super().training_step(batch, batch_idx)`; to change the loss, override `compute_loss` instead"
            )
        # `reduce` works in place.
        totals = strategy.reduce(self._sums.clone(), reduce_op="sum").cpu()
        self._sums = None
        return Contribution(*totals.unbind())


def rescale_gradients(parameters: Iterable[Tensor], count: float, world_size: int) -> Tensor:
    """Turn gradients of sums, averaged over ranks, into gradients of the mean.

    Args:
        parameters: Parameters that train; those without a gradient are left alone.
        count: Divisor of the sum, over the whole step and all ranks.
        world_size: Number of ranks that gradients were averaged over.

    Returns:
        Norm of the rescaled gradients over all ranks, before any clipping; a scalar, float32.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, world_size * REFERENCE_COUNT / count)
    norm = torch.nn.utils.get_total_norm(gradients)
    # Under FSDP2 the norm is a DTensor that still waits for its sum over ranks.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clip_gradients(parameters: Iterable[Tensor], limit: float, algorithm: str, norm: float) -> None:
    """Clip as torch does, with a norm that is right under every strategy.

    Args:
        parameters: Parameters that train.
        limit: Largest norm of all gradients together, or largest magnitude of an element.
        algorithm: ``norm`` or ``value``.
        norm: Result of `rescale_gradients`.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if algorithm == "value":
        for gradient in gradients:
            gradient.clamp_(-limit, limit)
    elif norm > limit:
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))


def micro_batch_seed(seed: int, index: int, rank: int) -> int:
    """Return the seed of a micro-batch.

    Args:
        seed: Seed of the run.
        index: Micro-batches of this rank before it, since the run began.
        rank: Number of this rank.

    Returns:
        63 bits that do not resemble those of another place.
    """
    digest = hashlib.blake2b(f"{seed}/{index}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_micro_batch(seed: int, index: int, rank: int) -> None:
    """Set torch's random numbers, of the CPU and of every accelerator, for one micro-batch; see `micro_batch_seed`."""
    torch.manual_seed(micro_batch_seed(seed, index, rank))

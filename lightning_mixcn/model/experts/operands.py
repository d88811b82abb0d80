"""What the expert block multiplies its rows with: frozen weights, LoRA factors, dropout masks.

Legend: T tokens, H hidden, I intermediate, E experts, K experts a token, R LoRA rank, n rows of one expert.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_mixcn.model.nf4.storage import Weight


class Factors(Protocol):
    """LoRA factors of one projection, see `lora.Factors`."""

    a: Tensor
    b: Tensor
    dropout: float


class Projection(Protocol):
    """What the expert block asks of its children: a `FrozenLinear` or the LoRA layer around it."""

    storage: Weight

    def factors(self, dtype: torch.dtype, groups: slice = slice(None)) -> Factors | None:
        """The active LoRA factors of some groups in ``dtype``."""


class ExpertWeights(NamedTuple):
    """Frozen weights of a layer: gate and up ``[E, I, H]``, down ``[E, H, I]``."""

    gate: Weight
    up: Weight
    down: Weight

    def decoders(self, dtype: torch.dtype) -> "ExpertDecoders":
        """What decodes them, expert by expert, in ``dtype``."""
        return ExpertDecoders(*(weight.decoder(dtype) for weight in self))


class ExpertDecoders(NamedTuple):
    """Give an expert's matrix: gate and up ``[I, H]``, down ``[H, I]``."""

    gate: Callable[[int], Tensor]
    up: Callable[[int], Tensor]
    down: Callable[[int], Tensor]


class ExpertFactors(NamedTuple):
    """LoRA factors in the compute dtype, α/r already in the Bs; ``None`` where a projection has no adapter.

    Args:
        a_gate_up: ``[E, R_gate + R_up, H]``: both projections read the same rows, so their As are one product.
        b_gate: ``[E, I, R_gate]``.
        b_up: ``[E, I, R_up]``.
        a_down: ``[E, R_down, I]``.
        b_down: ``[E, H, R_down]``.
    """

    a_gate_up: Tensor | None
    b_gate: Tensor | None
    b_up: Tensor | None
    a_down: Tensor | None
    b_down: Tensor | None


class Dropout(NamedTuple):
    """LoRA dropout: ``probability`` in [0, 1), and the seed that its masks are drawn from."""

    probability: float = 0.0
    seed: int = 0

    def mask(self, shape: tuple[int, ...], stream: int, like: Tensor) -> Tensor | None:
        """What ``stream`` (0: the block's input, 1 + e: expert e's hidden rows) is multiplied with: 0 or 1/(1-p).

        The same at each call with one seed; ``None`` where nothing is dropped.
        """
        if self.probability == 0.0:
            return None
        generator = torch.Generator(device=like.device).manual_seed(self.seed + stream)
        kept = torch.rand(shape, generator=generator, device=like.device) >= self.probability
        return kept.to(like.dtype).div_(1.0 - self.probability)


class BlockInputs(NamedTuple):
    """What the expert block is given, but for the routing.

    Args:
        x: ``[T, H]`` in the compute dtype.
        weight: ``[T, K]``, the routing weights; float32 or the compute dtype.
        weights: The frozen weights.
        dropout: LoRA dropout.
        lora: LoRA factors.
    """

    x: Tensor
    weight: Tensor
    weights: ExpertWeights
    dropout: Dropout
    lora: ExpertFactors


class BlockGradients(NamedTuple):
    """Gradients of the block's inputs.

    Args:
        x: ``[T, H]``; ``None`` where nobody needs it.
        weight: ``[T, K]`` in the dtype of the routing weights.
        lora: One for each factor that there is.
    """

    x: Tensor | None
    weight: Tensor
    lora: ExpertFactors

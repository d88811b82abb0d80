"""A stack of frozen linear maps and its product, whose backward computes the input's gradient only."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .storage import DenseWeight, NF4Weight, Weight


class _FrozenProduct(torch.autograd.Function):
    """``x Wᵀ``; W is decoded in forward and again in backward and never saved, and there is no dW."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return x @ weight.decoder(x.dtype)(0).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad @ ctx.weight.decoder(grad.dtype)(0) if ctx.needs_input_grad[0] else None), None


class LoraFactors(NamedTuple):
    """LoRA factors of a stack, ready for use.

    Args:
        a: ``[C, R, in]`` in the compute dtype, of the groups in `FrozenLinear.slots`.
        b: ``[C, out, R]`` in the compute dtype, scaled with α/r.
        dropout: Probability that applies now (0 in evaluation).
    """

    a: Tensor
    b: Tensor
    dropout: float


class LoraMasters(NamedTuple):
    """LoRA factors of a stack as they train.

    Args:
        a: ``[C, R, in]`` float32, of the groups in `FrozenLinear.slots`.
        b: ``[C, out, R]`` float32.
        scale: Factor of the product, α/r.
        dropout: Probability that applies now (0 in evaluation).
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float


class FrozenLinear(nn.Module):
    """``groups`` bias-free linear maps of one shape that are never trained (LoRA trains beside them).

    With one group it is called like ``nn.Linear``; stacks of experts (``groups = num_experts``) are used by the expert
    block, which reads ``storage.decoder(dtype)``.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        groups: Number of maps (experts).
        quantization: ``nf4`` or ``none``.
        dtype: Type of the stored weight where it is not quantised.
        device: Device of the (uninitialised) weight.

    Attributes:
        slots: Number of each group that has factors where LoRA adapts this layer, ascending → its place among them;
            all, unless `train_only` chooses some. The projections of an expert block have the same.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int = 1,
        *,
        quantization: str,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.slots = {group: group for group in range(groups)}
        shape = (groups, out_features, in_features)
        # PEFT takes an attribute named `weight` for a tensor, hence `storage`.
        self.storage: Weight = NF4Weight(shape, device) if quantization == "nf4" else DenseWeight(shape, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        assert self.groups == 1, "a stack of experts is called through its expert block"
        gemv = self.storage.gemv
        if gemv is not None and gemv.serves(x):
            return gemv.product(x)
        y: Tensor = _FrozenProduct.apply(x, self.storage)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return y

    def factors(self, dtype: torch.dtype, groups: slice = slice(None)) -> LoraFactors | None:
        """Return no LoRA factors; `LoraFrozenLinear.factors`, which PEFT puts in this layer's place, has them."""
        return None

    def active_masters(self) -> LoraMasters | None:
        """Return no LoRA factors, as `factors`."""
        return None

    def extra_repr(self) -> str:
        """Describe shape and storage, for ``print(model)``."""
        kind = "nf4" if isinstance(self.storage, NF4Weight) else "dense"
        return f"groups={self.groups}, in_features={self.in_features}, out_features={self.out_features}, {kind}"

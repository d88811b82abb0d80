"""Attention's projections on a GPU, LoRA inside their products: query, key and value as one, and the output's.

LoRA's dropout keeps no mask (`kernels.dropout`), and as the experts' gate and up, q, k and v read the same dropped
rows. Weights are decoded on a second stream while LoRA's A is multiplied with. In backward the gradients of x and of
``dropout(x) Aᵀ`` are two products: one of ``in + R`` columns would begin another wave of tiles for R of them.

Legend: B rows, S positions, T = B·S tokens, H width of what is projected, O of the results side by side, D head size,
R LoRA rank of a product.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from lightning_mixcn.model.nf4.linear import FrozenLinear
from lightning_mixcn.model.nf4.storage import NF4Weight
from lightning_mixcn.model.products.adapted import AdaptedProduct, FactorGradients, Operands
from lightning_mixcn.model.products.finish import finish, pending_output

if TYPE_CHECKING:  # its import needs Triton
    from lightning_mixcn.model.kernels.dropout import Drop


def can_fuse(projections: list[FrozenLinear]) -> bool:
    """Tell if the operand kernel can decode the weights: in 4 bits, and no row begins inside a byte of two codes."""
    weights = [projection.storage for projection in projections]
    return all(isinstance(weight, NF4Weight) and weight.shape[2] % 2 == 0 for weight in weights)


class Projections(NamedTuple):
    """Projections of the same rows, but for their masters.

    Args:
        weights: Frozen weights.
        scales: α/r of each.
        drop: LoRA dropout.
    """

    weights: list[NF4Weight]
    scales: list[float]
    drop: "Drop"

    @classmethod
    def of(cls, projections: list[FrozenLinear]) -> tuple[Self, list[Tensor | None]]:
        """Return layers' projections with a seed for their dropout, and their masters: A and B of each, or ``None``."""
        from lightning_mixcn.model.kernels.dropout import drop_arguments

        masters = [projection.active_masters() for projection in projections]
        probability = max((pair.dropout for pair in masters if pair is not None), default=0.0)
        # Drawn from torch's CPU generator, which activation checkpointing restores: recomputation sees the same masks.
        seed = int(torch.randint(2**31, (), device="cpu")) if probability > 0.0 else 0
        weights: Any = [projection.storage for projection in projections]
        scales = [1.0 if pair is None else pair.scale for pair in masters]
        factors = chain.from_iterable((None, None) if pair is None else (pair.a, pair.b) for pair in masters)
        return cls(weights, scales, drop_arguments(probability, seed)), list(factors)

    def product(self, masters: tuple[Tensor | None, ...], dtype: torch.dtype) -> AdaptedProduct:
        """Return all as one product."""
        adapted = zip(self.weights, masters[::2], masters[1::2], self.scales, strict=True)
        return AdaptedProduct(list(adapted), dtype)

    @property
    def widths(self) -> list[int]:
        """Return the widths of the results."""
        return [weight.shape[1] for weight in self.weights]


def project_states(
    hidden: Tensor, angles: tuple[Tensor, Tensor] | None, head_size: int, projections: list[FrozenLinear]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys, rotated by positions, and values; columns of one matrix.

    Args:
        hidden: ``[B, S, H]``.
        angles: Cosines and sines, see `kernels.rotary.rotate`; ``None`` leaves queries and keys as they are.
        head_size: D.
        projections: Those of q, k and v.

    Returns:
        ``[B, S, heads, D]`` each.
    """
    given, masters = Projections.of(projections)
    states: tuple[Tensor, Tensor, Tensor] = _States.apply(hidden, *(angles or (None, None)), head_size, given, *masters)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return states


def project_output(attended: Tensor, projection: FrozenLinear) -> Tensor:
    """Map ``[B, S, heads · D]`` to ``[B, S, H]``; recomputation leaves the product out."""
    given, masters = Projections.of([projection])
    return finish(*_Output.apply(attended, given, *masters))  # type: ignore[no-untyped-call]  # torch leaves apply untyped


class _States(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        head_size: int,
        given: Projections,
        *masters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        from lightning_mixcn.model.kernels.rotary import rotate

        x_TH = hidden.flatten(0, 1).contiguous()
        product = given.product(masters, x_TH.dtype)
        operands = Operands([(product, 0)], x_TH)
        wide = x_TH.new_empty(len(x_TH), product.width + product.rank) if product.rank else x_TH
        read_TH = _rows_for_a(product, x_TH, given.drop, wide)
        hidden_TR = _multiply_a(product, read_TH, wide)
        y_TO = torch.mm(wide, operands.take(product).t())
        query, key, value = _heads(y_TO, given.widths, hidden.shape[0], head_size)
        if cos is not None and sin is not None:
            rotate(query, key, cos, sin, out=(query, key))
        ctx.given, ctx.shape = given, hidden.shape
        ctx.save_for_backward(read_TH if product.rank else None, hidden_TR, cos, sin, *masters)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        from lightning_mixcn.model.kernels.rotary import rotate

        read_TH, hidden_TR, cos, sin, *masters = ctx.saved_tensors
        product = ctx.given.product(masters, dquery.dtype)
        operands = Operands([(product, 0)], dquery)
        rows, length, _, size = dquery.shape
        dy_TO = dquery.new_empty(rows * length, sum(ctx.given.widths))
        to_query, to_key, to_value = _heads(dy_TO, ctx.given.widths, rows, size)
        if cos is None:
            to_query.copy_(dquery)
            to_key.copy_(dkey)
        else:
            rotate(dquery.contiguous(), dkey.contiguous(), cos, sin, backwards=True, out=(to_query, to_key))
        to_value.copy_(dvalue)
        del dquery, dkey, dvalue
        dx, gradients = _backward(product, operands, dy_TO, read_TH, hidden_TR, ctx.given.drop, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, *gradients


class _Output(torch.autograd.Function):
    """All but the output, see `finish`."""

    @staticmethod
    def forward(
        ctx: Any, attended: Tensor, given: Projections, *masters: Tensor | None
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        x_TH = attended.flatten(0, 1).contiguous()
        product = given.product(masters, x_TH.dtype)
        read_TH = _rows_for_a(product, x_TH, given.drop, None)
        hidden_TR = _multiply_a(product, read_TH, None)
        ctx.given, ctx.shape = given, attended.shape
        ctx.save_for_backward(read_TH if product.rank else None, hidden_TR, *masters)
        output = partial(_output, product, x_TH, hidden_TR, attended.shape[0])
        return pending_output(attended, given.widths[0]), output

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        read_TH, hidden_TR, *masters = ctx.saved_tensors
        product = ctx.given.product(masters, dy.dtype)
        operands, dy_TO = Operands([(product, 0)], dy), dy.flatten(0, 1).contiguous()
        dx, gradients = _backward(product, operands, dy_TO, read_TH, hidden_TR, ctx.given.drop, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, *gradients


def _output(product: AdaptedProduct, x_TH: Tensor, hidden_TR: Tensor | None, rows: int) -> Tensor:
    operands = Operands([(product, 0)], x_TH)
    wide = x_TH
    if hidden_TR is not None:
        wide = x_TH.new_empty(len(x_TH), product.width + product.rank)
        wide[:, : product.width].copy_(x_TH)
        wide[:, product.width :].copy_(hidden_TR)
    return torch.mm(wide, operands.take(product).t()).view(rows, len(x_TH) // rows, -1)


def _rows_for_a(product: AdaptedProduct, x_TH: Tensor, drop: "Drop", wide: Tensor | None) -> Tensor:
    """Return the rows that A reads, and copy x to the first columns of ``wide [T, H + R]`` in the same pass."""
    from lightning_mixcn.model.kernels.rows import gather_rows

    drops = product.rank > 0 and drop.threshold > 0
    plain = None if wide is None or not product.rank else wide[:, : product.width]
    dropped = torch.empty_like(x_TH) if drops else None
    if plain is not None or dropped is not None:
        gather_rows(x_TH, torch.arange(len(x_TH), device=x_TH.device), plain, dropped, drop)
    return x_TH if dropped is None else dropped


def _multiply_a(product: AdaptedProduct, read_TH: Tensor, wide: Tensor | None) -> Tensor | None:
    """Return ``dropout(x) Aᵀ``, for backward, and copy it to the last columns of ``wide``."""
    if product.a is None:
        return None
    hidden_TR = torch.mm(read_TH, product.a[0].t())
    if wide is not None:
        wide[:, product.width :].copy_(hidden_TR)
    return hidden_TR


def _backward(
    product: AdaptedProduct,
    operands: Operands,
    dy_TO: Tensor,
    read_TH: Tensor | None,
    hidden_TR: Tensor | None,
    drop: "Drop",
    wants_dx: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of x ``[T, H]`` and of the masters."""
    from lightning_mixcn.model.kernels.rows import sum_rows

    gradients, operand = FactorGradients(product), operands.take(product)
    dx_TH = torch.mm(dy_TO, operand[:, : product.width]) if wants_dx else None
    if hidden_TR is not None:
        dhidden_TR = torch.mm(dy_TO, operand[:, product.width :])
        gradients.write(0, dy_TO, product.scaled(hidden_TR), dhidden_TR, read_TH)
        if dx_TH is not None:
            dropped_TH = torch.empty_like(dx_TH) if drop.threshold > 0 else None
            product.through_a(0, dhidden_TR, dx_TH, dropped_TH)
            if dropped_TH is not None:
                row_T1 = torch.arange(len(dx_TH), device=dx_TH.device)[:, None]
                dx_TH = sum_rows(dx_TH, row_T1, None, dropped_TH, drop)
    return dx_TH, list(gradients.of_masters([0]))


def _heads(y_TO: Tensor, widths: list[int], rows: int, size: int) -> list[Tensor]:
    """Return the projections' columns as ``[B, S, heads, D]``."""
    length = len(y_TO) // rows
    return [part.view(rows, length, -1, size) for part in torch.split(y_TO, widths, dim=1)]

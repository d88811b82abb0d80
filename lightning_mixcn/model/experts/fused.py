"""The expert block for training on a GPU: expert by expert as `loop`, with fewer products and passes over memory.

LoRA is inside the large products, see `products.adapted`, and gate and up are one. While one is computed, the next
one's weights are decoded. SwiGLU, gathering and summing are Triton's, with dropout that no mask is kept of.

Legend: T tokens, H hidden, I intermediate, E experts, C those of them with LoRA factors, K experts a token, S = T·K
routed rows, n rows of one expert, R LoRA rank of a product: gate's and up's side by side, or down's, and zeros up to a
multiple of 8.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_mixcn.model.products.adapted import AdaptedProduct, FactorGradients, Operands
from lightning_mixcn.model.products.finish import finish, pending_output

from .loop import Dropout, ExpertFactors, ExpertWeights
from .routing import Routing, route_rows

if TYPE_CHECKING:  # its import needs Triton
    from lightning_mixcn.model.kernels.dropout import Drop


class ExpertMasters(NamedTuple):
    """LoRA factors, α/r not in them, in any type; ``None`` where a projection has no adapter.

    Args:
        a_gate: ``[C, R_gate, H]``.
        b_gate: ``[C, I, R_gate]``.
        a_up: ``[C, R_up, H]``.
        b_up: ``[C, I, R_up]``.
        a_down: ``[C, R_down, I]``.
        b_down: ``[C, H, R_down]``.
        slots: `FrozenLinear.slots`; ``None`` for all experts.
    """

    a_gate: Tensor | None
    b_gate: Tensor | None
    a_up: Tensor | None
    b_up: Tensor | None
    a_down: Tensor | None
    b_down: Tensor | None
    slots: Mapping[int, int] | None = None


# α/r of gate, up and down.
Scales = tuple[float, float, float]


def fused_experts(
    x: Tensor, index: Tensor, weight: Tensor, weights: ExpertWeights, dropout: Dropout, *factors: Any
) -> Tensor:
    """Run the path with the arguments of `expert_loop`; `fused_loop` itself takes masters."""
    a_gate_up, b_gate, b_up, a_down, b_down, slots = ExpertFactors(*factors)
    ranks = [0 if b is None else b.shape[2] for b in (b_gate, b_up)]
    a_gate, a_up = (None, None) if a_gate_up is None else torch.split(a_gate_up, ranks, dim=1)
    masters = ExpertMasters(
        None if b_gate is None else a_gate, b_gate, None if b_up is None else a_up, b_up, a_down, b_down, slots
    )
    return fused_loop(x, index, weight, weights, dropout, (1.0, 1.0, 1.0), *masters)


def _gate_up(weights: ExpertWeights, scales: Scales, masters: ExpertMasters, dtype: torch.dtype) -> AdaptedProduct:
    gate = weights[0], masters.a_gate, masters.b_gate, scales[0]
    return AdaptedProduct([gate, (weights[1], masters.a_up, masters.b_up, scales[1])], dtype, masters.slots)


def _down(weights: ExpertWeights, scales: Scales, masters: ExpertMasters, dtype: torch.dtype) -> AdaptedProduct:
    return AdaptedProduct([(weights[2], masters.a_down, masters.b_down, scales[2])], dtype, masters.slots)


def fused_loop(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    weights: ExpertWeights,
    dropout: Dropout,
    scales: Scales,
    *masters: Any,
) -> Tensor:
    """Compute the block by the path ``fused``.

    Args:
        x: ``[T, H]`` in the compute dtype.
        index: ``[T, K]`` int64, the chosen experts.
        weight: ``[T, K]``, their routing weights; float32 or the compute dtype.
        weights: Frozen weights.
        dropout: LoRA dropout; the mask of a token's row depends on the token, the expert and the seed.
        scales: α/r of gate, up and down.
        masters: Members of `ExpertMasters`.

    Returns:
        ``[T, H]`` in the dtype of ``x``: Σₖ weight · down(silu(gate x) ⊙ up x).
    """
    return finish(*_FusedLoop.apply(x, index, weight, weights, dropout, scales, *masters))  # type: ignore[no-untyped-call]  # torch leaves apply untyped


class _FusedLoop(torch.autograd.Function):
    """All but the output, see `finish`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        weight: Tensor,
        weights: ExpertWeights,
        dropout: Dropout,
        scales: Scales,
        *masters: Any,
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Compute gate and up."""
        from lightning_mixcn.model.kernels.dropout import drop_arguments
        from lightning_mixcn.model.kernels.rows import gather_rows

        x, drop = x.contiguous(), drop_arguments(*dropout)
        factors = ExpertMasters(*masters)
        product = _gate_up(weights, scales, factors, x.dtype)
        routing = route_rows(index, weights[0].shape[0], padded=False)
        rows_S, experts = len(routing.token), list(routing.experts())
        gate_up_S2I = x.new_empty(rows_S, weights[0].shape[1] + weights[1].shape[1])
        hidden_SR = x.new_empty(rows_S, product.rank)
        operands = Operands([(product, expert) for expert, _ in experts], x)
        for expert, rows in experts:
            token = routing.token[rows]
            wide, dropped = _rows_of(product, expert, len(token), x, drop.threshold > 0)
            gather_rows(x, token, wide[:, : product.width], dropped, drop)
            hidden_nR = product.multiply_a(expert, wide, dropped)
            hidden_SR[rows, : hidden_nR.shape[1]] = hidden_nR
            torch.mm(wide, operands.take(product).t(), out=gate_up_S2I[rows])
            del wide, dropped, hidden_nR
        ctx.weights, ctx.scales, ctx.drop, ctx.offsets, ctx.slots = (
            weights,
            scales,
            drop,
            routing.offsets,
            factors.slots,
        )
        ctx.save_for_backward(x, weight, gate_up_S2I, hidden_SR, routing.token, routing.row, *factors[:-1])
        return pending_output(x), partial(_output, gate_up_S2I, routing, weight, weights, drop, scales, factors)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the routing weights and the masters."""
        from lightning_mixcn.model.kernels.dropout import COLUMNS
        from lightning_mixcn.model.kernels.expert_swiglu import expert_swiglu_backward
        from lightning_mixcn.model.kernels.rows import gather_rows, sum_rows

        x, weight_TK, gate_up_S2I, hidden_SR, token_S, row_TK, *masters = ctx.saved_tensors
        operands_of = ctx.weights, ctx.scales, ExpertMasters(*masters)._replace(slots=ctx.slots), x.dtype
        gate_up, down = _gate_up(*operands_of), _down(*operands_of)
        dgate_up, ddown = FactorGradients(gate_up), FactorGradients(down)
        grad_TH, rows_S = grad_TH.contiguous(), len(token_S)
        weight_S = x.new_empty(rows_S, dtype=torch.float32)
        weight_S.index_copy_(0, row_TK.flatten(), weight_TK.flatten().float())
        hidden_SR = gate_up.scaled(hidden_SR)
        dweight_S = x.new_empty(rows_S, -(-down.width // COLUMNS), dtype=torch.float32)
        dx_SH = x.new_empty(rows_S, gate_up.width + gate_up.rank)
        drops, wants_dx = ctx.drop.threshold > 0, ctx.needs_input_grad[0]
        dx_dropped_SH = x.new_empty(rows_S, gate_up.width) if gate_up.rank and drops else None
        experts = list(Routing(token_S, row_TK, ctx.offsets).experts())
        operands = Operands([(product, expert) for expert, _ in experts for product in (down, gate_up)], x)
        for expert, rows in experts:
            token = token_S[rows]
            dy_nH = x.new_empty(len(token), x.shape[1])
            gather_rows(grad_TH, token, dy_nH, None, ctx.drop)
            dh = torch.mm(dy_nH, operands.take(down))
            adapts_down = down.slot(expert) is not None
            dh_dropped = x.new_empty(len(token), down.width) if adapts_down and drops else None
            dh_nI, dhidden_nR = dh[:, : down.width], dh[:, down.width :]
            down.through_a(expert, dhidden_nR, dh_nI, dh_dropped)
            dy_n2I, dropped = expert_swiglu_backward(
                gate_up_S2I[rows], dh_nI, dh_dropped, weight_S[rows], token, expert, ctx.drop,
                dweight_S[rows], adapted=adapts_down,
            )  # fmt: skip
            if dropped is not None:
                # Made again: saved, it would have recomputation run until there is h. It has the routing weight of h.
                ddown.write(expert, dy_nH, down.scaled_hidden(expert, dropped), dhidden_nR, dropped)
            del dy_nH, dh, dh_nI, dhidden_nR, dh_dropped, dropped
            dx_nH = torch.mm(dy_n2I, operands.take(gate_up), out=dx_SH[rows, : gate_up.columns(expert)])
            if gate_up.slot(expert) is not None:
                x_nH = x.new_empty(len(token), gate_up.width)
                gather_rows(x, token, None, x_nH, ctx.drop)
                dhidden_nR, dx_nH = dx_nH[:, gate_up.width :], dx_nH[:, : gate_up.width]
                dgate_up.write(expert, dy_n2I, hidden_SR[rows], dhidden_nR, x_nH)
                if wants_dx:
                    gate_up.through_a(expert, dhidden_nR, dx_nH, None if dx_dropped_SH is None else dx_dropped_SH[rows])
                del x_nH
            elif dx_dropped_SH is not None:
                dx_dropped_SH[rows] = 0
            del dy_n2I
        used = [expert for expert, _ in experts]
        dx = sum_rows(dx_SH[:, : gate_up.width], row_TK, None, dx_dropped_SH, ctx.drop) if wants_dx else None
        dweight = dweight_S.sum(1)[row_TK].to(weight_TK.dtype)
        return dx, None, dweight, None, None, None, *dgate_up.of_masters(used), *ddown.of_masters(used), None


def _output(
    gate_up_S2I: Tensor,
    routing: Routing,
    weight_TK: Tensor,
    weights: ExpertWeights,
    drop: "Drop",
    scales: Scales,
    masters: ExpertMasters,
) -> Tensor:
    """Compute the output ``[T, H]`` from gate and up."""
    from lightning_mixcn.model.kernels.expert_swiglu import expert_swiglu
    from lightning_mixcn.model.kernels.rows import sum_rows

    product = _down(weights, scales, masters, gate_up_S2I.dtype)
    experts = list(routing.experts())
    y_SH = gate_up_S2I.new_empty(len(gate_up_S2I), weights[2].shape[1])
    operands = Operands([(product, expert) for expert, _ in experts], y_SH)
    for expert, rows in experts:
        token = routing.token[rows]
        wide, dropped = _rows_of(product, expert, len(token), y_SH, drop.threshold > 0)
        expert_swiglu(gate_up_S2I[rows], token, expert, drop, wide[:, : product.width], dropped)
        product.multiply_a(expert, wide, dropped)
        torch.mm(wide, operands.take(product).t(), out=y_SH[rows])
        del wide, dropped
    return sum_rows(y_SH, routing.row, weight_TK)


def _rows_of(
    product: AdaptedProduct, expert: int, count: int, like: Tensor, drops: bool
) -> tuple[Tensor, Tensor | None]:
    """Return memory for ``count`` rows ``[n, columns]``, and for dropped rows ``[n, in]`` if there are."""
    wide, drops = like.new_empty(count, product.columns(expert)), drops and product.slot(expert) is not None
    return wide, like.new_empty(count, product.width) if drops else None

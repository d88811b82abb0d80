"""The expert block expert by expert: each matrix is decoded when it is used and not kept.

One decoded matrix lives at a time (0.12 GB for Mixtral-8x7B), and the rows of each expert are known to the host: one
synchronisation a layer. On the CPU it is the only path: few row counts keep oneDNN's kernels. The LoRA factors and the
dropout that `grouped` takes, too, are here.

Legend: T tokens, H hidden, I intermediate, E experts, C those of them with LoRA factors, K experts a token, R LoRA
rank, S = T·K routed rows, P = rows with each expert's share padded, n = rows of one expert.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mixcn.model.nf4.storage import Weight
from lightning_mixcn.model.products.finish import finish, pending_output

from .routing import Routing, route_rows, sum_choices

# Frozen weights of gate and up ``[E, I, H]``, and down ``[E, H, I]``.
ExpertWeights = tuple[Weight, Weight, Weight]


class ExpertFactors(NamedTuple):
    """LoRA factors in the compute dtype, α/r already in the Bs; ``None`` where a projection has no adapter.

    Args:
        a_gate_up: ``[C, R_gate + R_up, H]``: both projections read the same rows, so their As are one product.
        b_gate: ``[C, I, R_gate]``.
        b_up: ``[C, I, R_up]``.
        a_down: ``[C, R_down, I]``.
        b_down: ``[C, H, R_down]``.
        slots: `FrozenLinear.slots`; ``None`` for all experts.
    """

    a_gate_up: Tensor | None
    b_gate: Tensor | None
    b_up: Tensor | None
    a_down: Tensor | None
    b_down: Tensor | None
    slots: Mapping[int, int] | None = None

    def slot(self, expert: int) -> int | None:
        """Return the place of an expert's factors; ``None`` if it has none."""
        return expert if self.slots is None else self.slots.get(expert)

    def halves(self, gate: Tensor, up: Tensor) -> list[tuple[Tensor, Tensor, slice]]:
        """Return, for gate and up if adapted, the given tensor, B, and B's columns of ``rows @ a_gate_upᵀ``."""
        column, found = 0, []
        for tensor, b in ((gate, self.b_gate), (up, self.b_up)):
            if b is not None:
                found.append((tensor, b, slice(column, column + b.shape[2])))
                column += b.shape[2]
        return found


class Dropout(NamedTuple):
    """LoRA dropout: ``probability`` in [0, 1), and the seed that its masks are drawn from."""

    probability: float = 0.0
    seed: int = 0

    def mask(self, shape: tuple[int, ...], stream: int, like: Tensor) -> Tensor | None:
        """Draw factors of 0 or 1/(1-p), the same at each call with one seed; ``None`` where nothing is dropped.

        Args:
            shape: Shape of the mask.
            stream: 0 for the block's input, 1 + e for expert e's hidden rows.
            like: Tensor of the device and dtype.
        """
        if self.probability == 0.0:
            return None
        generator = torch.Generator(device=like.device).manual_seed(self.seed + stream)
        kept = torch.rand(shape, generator=generator, device=like.device) >= self.probability
        return kept.to(like.dtype).div_(1.0 - self.probability)


def masked(rows: Tensor, mask: Tensor | None, token: Tensor | None = None) -> Tensor:
    """Multiply rows with their dropout mask; with ``token``, the mask has a row for each token."""
    if mask is None:
        return rows
    return rows * (mask if token is None else mask.index_select(0, token))


def expert_loop(
    x: Tensor, index: Tensor, weight: Tensor, weights: ExpertWeights, dropout: Dropout, *factors: Any
) -> Tensor:
    """Compute the block by the path ``loop``.

    Args:
        x: ``[T, H]`` in the compute dtype.
        index: ``[T, K]`` int64, the chosen experts.
        weight: ``[T, K]``, their routing weights; float32 or the compute dtype.
        weights: Frozen weights.
        dropout: LoRA dropout.
        factors: Members of `ExpertFactors`.

    Returns:
        ``[T, H]`` in the dtype of ``x``: Σₖ weight · down(silu(gate x) ⊙ up x).
    """
    return finish(*_ExpertLoop.apply(x, index, weight, weights, dropout, *factors))  # type: ignore[no-untyped-call]  # torch leaves apply untyped


class _ExpertLoop(torch.autograd.Function):
    """All but the output, see `finish`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, weight: Tensor, weights: ExpertWeights, dropout: Dropout, *factors: Any
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Compute gate and up."""
        lora = ExpertFactors(*factors)
        padded = x.device.type == "cpu" and x.dtype != torch.float32  # float32 products run in MKL, not in oneDNN
        routing = route_rows(index, weights[0].shape[0], padded)
        rows_P = len(routing.token)
        # Halves of one buffer, as transformers computes them: SiLU's last bit depends on the stride.
        gate_up_P2I = x.new_empty(rows_P, 2 * weights[0].shape[1])
        gate_PI, up_PI = gate_up_P2I.chunk(2, dim=1)
        hidden_gate_up = None if lora.a_gate_up is None else x.new_empty(rows_P, lora.a_gate_up.shape[1])
        mask_TH = dropout.mask(x.shape, 0, x)
        decode_gate, decode_up = (weight.decoder(x.dtype) for weight in weights[:2])
        for expert, rows in routing.experts():
            token = routing.token[rows]
            x_nH, gate, up = x.index_select(0, token), gate_PI[rows], up_PI[rows]
            torch.mm(x_nH, decode_gate(expert).t(), out=gate)
            torch.mm(x_nH, decode_up(expert).t(), out=up)
            slot = lora.slot(expert)
            if slot is not None and lora.a_gate_up is not None and hidden_gate_up is not None:
                hidden = hidden_gate_up[rows]
                torch.mm(masked(x_nH, mask_TH, token), lora.a_gate_up[slot].t(), out=hidden)
                for result, b, rank in lora.halves(gate, up):
                    result.addmm_(hidden[:, rank], b[slot].t())
        ctx.weights, ctx.dropout, ctx.offsets, ctx.slots = weights, dropout, routing.offsets, lora.slots
        ctx.save_for_backward(x, weight, gate_up_P2I, hidden_gate_up, routing.token, routing.row, *lora[:-1])
        return pending_output(x), partial(_down, gate_up_P2I, routing, weight, weights[2], dropout, lora)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the routing weights and the factors."""
        x, weight_TK, gate_up_P2I, hidden_gate_up, token_P, row_TK, *factors = ctx.saved_tensors
        lora = ExpertFactors(*factors)._replace(slots=ctx.slots)
        gate_PI, up_PI = gate_up_P2I.chunk(2, dim=1)
        weight_P = weight_TK.new_zeros(len(token_P)).index_copy_(0, row_TK.flatten(), weight_TK.flatten()).to(x.dtype)
        dweight_P = torch.zeros(len(token_P), dtype=torch.float32, device=x.device)
        dx_PH = x.new_empty(len(token_P), x.shape[1]) if ctx.needs_input_grad[0] else None
        gradients: list[Any] = [None if factor is None else torch.zeros_like(factor) for factor in factors]
        dlora = ExpertFactors(*gradients)
        mask_TH = ctx.dropout.mask(x.shape, 0, x)
        decode_gate, decode_up, decode_down = (weight.decoder(x.dtype) for weight in ctx.weights)
        for expert, rows in Routing(token_P, row_TK, ctx.offsets).experts():
            gate, up, token, weight = gate_PI[rows], up_PI[rows], token_P[rows], weight_P[rows, None]
            silu, grad_nH = F.silu(gate), grad_TH.index_select(0, token)
            h_nI = silu * up
            dh, slot = grad_nH @ decode_down(expert), lora.slot(expert)
            if slot is not None and lora.a_down is not None:
                mask_nI = ctx.dropout.mask(h_nI.shape, 1 + expert, h_nI)
                _train_down(lora, dlora, slot, h_nI, grad_nH, weight, dh, mask_nI)
            torch.sum(h_nI.mul_(dh), dim=1, dtype=torch.float32, out=dweight_P[rows])
            dh.mul_(weight)
            dup = silu.mul_(dh)
            dgate = torch.ops.aten.silu_backward(dh.mul_(up), gate)
            dx_nH = None if dx_PH is None else dx_PH[rows]
            if dx_nH is not None:
                torch.mm(dgate, decode_gate(expert), out=dx_nH)
                dx_nH.addmm_(dup, decode_up(expert))
            if slot is not None and hidden_gate_up is not None:
                mask_nH = None if mask_TH is None else mask_TH.index_select(0, token)
                hidden = hidden_gate_up[rows]
                # Not in a variable, which would hold the rows until the next expert's are there.
                _train_gate_up(lora, dlora, slot, x.index_select(0, token), hidden, dgate, dup, dx_nH, mask_nH)
        dx = None if dx_PH is None else sum_choices(dx_PH, row_TK, None, x.dtype)
        return dx, None, dweight_P[row_TK].to(weight_TK.dtype), None, None, *gradients, None


def _down(
    gate_up_P2I: Tensor, routing: Routing, weight_TK: Tensor, down: Weight, dropout: Dropout, lora: ExpertFactors
) -> Tensor:
    """Compute the output ``[T, H]`` from gate and up."""
    gate_PI, up_PI = gate_up_P2I.chunk(2, dim=1)
    decode, y_PH = down.decoder(gate_up_P2I.dtype), gate_up_P2I.new_empty(len(gate_up_P2I), down.shape[1])
    for expert, rows in routing.experts():
        h_nI = F.silu(gate_PI[rows]).mul_(up_PI[rows])
        y = torch.mm(h_nI, decode(expert).t(), out=y_PH[rows])
        if (slot := lora.slot(expert)) is not None and lora.a_down is not None and lora.b_down is not None:
            h_dropped = masked(h_nI, dropout.mask(h_nI.shape, 1 + expert, h_nI))
            y.addmm_(h_dropped @ lora.a_down[slot].t(), lora.b_down[slot].t())
    return sum_choices(y_PH, routing.row, weight_TK, y_PH.dtype)


def _train_down(
    lora: ExpertFactors,
    dlora: ExpertFactors,
    slot: int,
    h_nI: Tensor,
    grad_nH: Tensor,
    weight_n1: Tensor,
    dh_nI: Tensor,
    mask_nI: Tensor | None,
) -> None:
    """Write the gradients of the down projection's factors, and add what comes through them to ``dh_nI``.

    ``dh_nI`` and ``grad_nH`` are not scaled with the routing weight yet.
    """
    a, b, da, db = lora.a_down, lora.b_down, dlora.a_down, dlora.b_down
    assert a is not None
    assert b is not None
    assert da is not None
    assert db is not None
    through_b, h_dropped = grad_nH @ b[slot], masked(h_nI, mask_nI)
    # Made again: saved, it would have recomputation run until there is h.
    hidden = h_dropped @ a[slot].t()
    torch.mm(grad_nH.t(), hidden.mul_(weight_n1), out=db[slot])
    torch.mm((through_b * weight_n1).t(), h_dropped, out=da[slot])
    del h_dropped  # before as much is taken again
    if mask_nI is None:
        dh_nI.addmm_(through_b, a[slot])
    else:
        dh_nI.add_((through_b @ a[slot]).mul_(mask_nI))


def _train_gate_up(
    lora: ExpertFactors,
    dlora: ExpertFactors,
    slot: int,
    x_nH: Tensor,
    hidden_nR: Tensor,
    dgate: Tensor,
    dup: Tensor,
    dx_nH: Tensor | None,
    mask_nH: Tensor | None,
) -> None:
    """Write the gradients of the gate and up projections' factors, and add what comes through them to ``dx_nH``."""
    a, da = lora.a_gate_up, dlora.a_gate_up
    assert a is not None
    assert da is not None
    through_b = torch.zeros_like(hidden_nR)
    for (grad, b, rank), (_, db, _) in zip(lora.halves(dgate, dup), dlora.halves(dgate, dup), strict=True):
        torch.mm(grad.t(), hidden_nR[:, rank], out=db[slot])
        through_b[:, rank] = grad @ b[slot]
    torch.mm(through_b.t(), masked(x_nH, mask_nH), out=da[slot])
    if dx_nH is not None:
        dx_nH.add_(masked(through_b @ a[slot], mask_nH))

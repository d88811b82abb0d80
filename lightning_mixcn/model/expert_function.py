"""The expert block as one autograd function: routed SwiGLU experts over frozen weights with split LoRA.

Saved for backward: the block's input, the gate and up projections' results (``2·S·I``), the products with LoRA's A
(``3·S·R``), the routing and the LoRA factors. Decoded again in backward: the frozen weights. Recomputed: SwiGLU, the
gathered rows, and the dropout masks (from a seed). Never computed: a frozen weight's gradient, and the down
projection's result in backward: the gradient of a routing weight is ⟨dh, h⟩, since the down projection is linear
(SonicMoE, https://arxiv.org/abs/2512.14080).

Legend: T tokens, H hidden, I intermediate, E experts, K experts a token, R LoRA rank, S = T·K routed rows,
P = rows with each expert's share padded, n = rows of one expert.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import Weight


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


def padded_rows(rows: int) -> int:
    """Rows of one expert on the CPU in 16 bits: a power of two up to 32, then the next multiple of 32.

    oneDNN builds a kernel for each new row count, which costs more than the product; few counts keep its cache warm.
    """
    return 1 << (rows - 1).bit_length() if 0 < rows < 32 else -(-rows // 32) * 32


@dataclass
class Routing:
    """Which row is which token, expert by expert.

    Args:
        token: ``[P]`` int64, the token of each row; 0 in padding, whose routing weight and gradient are 0.
        row: ``[T, K]`` int64, where a token's k-th choice stands among the rows.
        offsets: ``E + 1`` row offsets of the experts.
    """

    token: Tensor
    row: Tensor
    offsets: list[int]

    def experts(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, with them."""
        for expert, (start, stop) in enumerate(pairwise(self.offsets)):
            if stop > start:
                yield expert, slice(start, stop)


def route_rows(index_TK: Tensor, num_experts: int, padded: bool) -> Routing:
    """Sort the routed rows by expert, once; one host synchronisation. ``padded``: apply `padded_rows`."""
    expert_S = index_TK.reshape(-1)
    order_S = torch.argsort(expert_S, stable=True)
    counts = torch.bincount(expert_S, minlength=num_experts).tolist()
    sizes = [padded_rows(count) for count in counts] if padded else counts
    offsets = [0, *accumulate(sizes)]
    first_S = [0, *accumulate(counts)]
    shift_E = torch.tensor(
        [start - first for start, first in zip(offsets, first_S, strict=True)], device=expert_S.device
    )
    place_S = torch.arange(expert_S.numel(), device=expert_S.device) + shift_E[expert_S[order_S]]
    token_P = order_S.new_zeros(offsets[-1]).index_copy_(0, place_S, order_S // index_TK.shape[1])
    row_S = torch.empty_like(order_S).index_copy_(0, order_S, place_S)
    return Routing(token_P, row_S.view_as(index_TK), offsets)


class ExpertBlock(torch.autograd.Function):
    """See the module's docstring. Call it as ``ExpertBlock.apply(x, index, weight, weights, dropout, *factors)``.

    Args (of apply):
        x: ``[T, H]`` in the compute dtype.
        index: ``[T, K]`` int64, the chosen experts.
        weight: ``[T, K]``, their routing weights; float32 or the compute dtype.
        weights: the frozen weights.
        dropout: LoRA dropout.
        factors: the five tensors of `ExpertFactors`.

    Returns:
        ``[T, H]`` in the dtype of ``x``: Σₖ weight · down(silu(gate x) ⊙ up x).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, weight: Tensor, weights: ExpertWeights, dropout: Dropout, *factors: Tensor
    ) -> Tensor:
        """Run the block."""
        lora = ExpertFactors(*factors)
        padded = x.device.type == "cpu" and x.dtype != torch.float32  # float32 products run in MKL, not in oneDNN
        routing = route_rows(index, weights.gate.shape[0], padded)
        # Halves of one buffer, as transformers computes them: SiLU's last bit depends on the stride.
        gate_up_P2I = x.new_empty(len(routing.token), 2 * weights.gate.shape[1])
        gate_PI, up_PI = gate_up_P2I.chunk(2, dim=1)
        y_PH = x.new_empty(len(routing.token), x.shape[1])
        hidden_gate_up = None if lora.a_gate_up is None else x.new_empty(len(y_PH), lora.a_gate_up.shape[1])
        hidden_down = None if lora.a_down is None else x.new_empty(len(y_PH), lora.a_down.shape[1])
        mask_TH = dropout.mask(x.shape, 0, x)
        decoders = weights.decoders(x.dtype)
        for expert, rows in routing.experts():
            token = routing.token[rows]
            x_nH, gate, up = x[token], gate_PI[rows], up_PI[rows]
            torch.mm(x_nH, decoders.gate(expert).t(), out=gate)
            torch.mm(x_nH, decoders.up(expert).t(), out=up)
            if lora.a_gate_up is not None and hidden_gate_up is not None:
                torch.mm(_times(x_nH, mask_TH, token), lora.a_gate_up[expert].t(), out=hidden_gate_up[rows])
                _add_gate_up(gate, up, hidden_gate_up[rows], lora, expert)
            h_nI = F.silu(gate).mul_(up)
            y = torch.mm(h_nI, decoders.down(expert).t(), out=y_PH[rows])
            if lora.a_down is not None and lora.b_down is not None and hidden_down is not None:
                h_dropped = _times(h_nI, dropout.mask(h_nI.shape, 1 + expert, x))
                hidden = torch.mm(h_dropped, lora.a_down[expert].t(), out=hidden_down[rows])
                y.addmm_(hidden, lora.b_down[expert].t())
        saved = (x, weight, gate_up_P2I, hidden_gate_up, hidden_down, routing.token, routing.row)
        ctx.save_for_backward(*saved, *factors)
        ctx.offsets, ctx.weights, ctx.dropout = routing.offsets, weights, dropout
        return _sum_choices(y_PH, routing.row, weight, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the routing weights and the LoRA factors."""
        x, weight_TK, gate_up_P2I, hidden_gate_up, hidden_down, token_P, row_TK, *factors = ctx.saved_tensors
        gate_PI, up_PI = gate_up_P2I.chunk(2, dim=1)
        routing = Routing(token_P, row_TK, ctx.offsets)
        weight_P = weight_TK.new_zeros(len(token_P)).index_copy_(0, row_TK.flatten(), weight_TK.flatten()).to(x.dtype)
        dweight_P = torch.zeros(len(token_P), dtype=torch.float32, device=x.device)
        dx_PH = x.new_empty(len(token_P), x.shape[1]) if ctx.needs_input_grad[0] else None
        lora = ExpertFactors(*factors)
        dlora = ExpertFactors(*(None if factor is None else torch.zeros_like(factor) for factor in factors))
        decoders, mask_TH = ctx.weights.decoders(x.dtype), ctx.dropout.mask(x.shape, 0, x)
        step = _ExpertBackward(decoders, ctx.dropout, lora, dlora, x, mask_TH)
        for expert, rows in routing.experts():
            gate, up, token, weight = gate_PI[rows], up_PI[rows], token_P[rows], weight_P[rows, None]
            silu = F.silu(gate)
            h_nI = silu * up
            dh = step.down(expert, h_nI, None if hidden_down is None else hidden_down[rows], grad_TH[token], weight)
            torch.sum(h_nI.mul_(dh), dim=1, dtype=torch.float32, out=dweight_P[rows])
            dh.mul_(weight)
            dup = silu.mul_(dh)
            dgate = torch.ops.aten.silu_backward(dh.mul_(up), gate)
            hidden = None if hidden_gate_up is None else hidden_gate_up[rows]
            step.gate_up(expert, dgate, dup, hidden, token, None if dx_PH is None else dx_PH[rows])
        dx = None if dx_PH is None else _sum_choices(dx_PH, row_TK, None, x.dtype)
        return dx, None, dweight_P[row_TK].to(weight_TK.dtype), None, None, *dlora


@dataclass
class _ExpertBackward:
    """Backward of one expert's two stages; adds to ``dlora`` in place."""

    decoders: ExpertDecoders
    dropout: Dropout
    lora: ExpertFactors
    dlora: ExpertFactors
    x: Tensor
    mask: Tensor | None

    def down(self, expert: int, h_nI: Tensor, hidden_nR: Tensor | None, grad_nH: Tensor, weight_n1: Tensor) -> Tensor:
        """The gradient of h before it is scaled by the routing weight, ``[n, I]``."""
        dh: Tensor = grad_nH @ self.decoders.down(expert)
        a, b, da, db = self.lora.a_down, self.lora.b_down, self.dlora.a_down, self.dlora.b_down
        if a is None or b is None or da is None or db is None or hidden_nR is None:
            return dh
        mask = self.dropout.mask(h_nI.shape, 1 + expert, h_nI)
        h_dropped = _times(h_nI, mask)
        through_b = grad_nH @ b[expert]
        torch.mm(grad_nH.t(), hidden_nR * weight_n1, out=db[expert])
        torch.mm((through_b * weight_n1).t(), h_dropped, out=da[expert])
        return dh.addmm_(through_b, a[expert]) if mask is None else dh.add_((through_b @ a[expert]).mul_(mask))

    def gate_up(
        self,
        expert: int,
        dgate: Tensor,
        dup: Tensor,
        hidden_nR: Tensor | None,
        token: Tensor,
        dx_nH: Tensor | None,
    ) -> None:
        """Write the gradient of the expert's input rows into ``dx_nH``."""
        if dx_nH is not None:
            torch.mm(dgate, self.decoders.gate(expert), out=dx_nH)
            dx_nH.addmm_(dup, self.decoders.up(expert))
        a, da = self.lora.a_gate_up, self.dlora.a_gate_up
        if a is None or da is None or hidden_nR is None:
            return
        x_nH = _times(self.x[token], self.mask, token)
        through_b = torch.zeros_like(hidden_nR)
        column = 0
        for grad, b, db in ((dgate, self.lora.b_gate, self.dlora.b_gate), (dup, self.lora.b_up, self.dlora.b_up)):
            if b is not None and db is not None:
                rank = slice(column, column + b.shape[2])
                torch.mm(grad.t(), hidden_nR[:, rank], out=db[expert])
                through_b[:, rank] = grad @ b[expert]
                column = rank.stop
        torch.mm(through_b.t(), x_nH, out=da[expert])
        if dx_nH is not None:
            dx_nH.add_(_times(through_b @ a[expert], self.mask, token))


def _add_gate_up(gate: Tensor, up: Tensor, hidden_nR: Tensor, lora: ExpertFactors, expert: int) -> None:
    column = 0
    for result, b in ((gate, lora.b_gate), (up, lora.b_up)):
        if b is not None:
            result.addmm_(hidden_nR[:, column : column + b.shape[2]], b[expert].t())
            column += b.shape[2]


def _times(rows: Tensor, mask: Tensor | None, token: Tensor | None = None) -> Tensor:
    if mask is None:
        return rows
    return rows * (mask if token is None else mask[token])


def _sum_choices(rows_PH: Tensor, row_TK: Tensor, weight_TK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σₖ weight · row over each token's K rows, in float32; a gather, so that the order of the sum is fixed."""
    total: Tensor | None = None
    for k in range(row_TK.shape[1]):
        rows = rows_PH[row_TK[:, k]].float()
        rows = rows if weight_TK is None else rows.mul_(weight_TK[:, k, None])
        total = rows if total is None else total.add_(rows)
    assert total is not None, "top-k is at least 1"
    return total.to(dtype)

"""The expert block expert by expert: each matrix is decoded when it is used and not kept.

One decoded matrix lives at a time (0.12 GB for Mixtral-8x7B), and the rows of each expert are known to the host: one
synchronisation a layer. On the CPU it is the only path: few row counts keep oneDNN's kernels.

Legend: T tokens, H hidden, I intermediate, E experts, K experts a token, R LoRA rank, P = rows with each expert's
share padded, n = rows of one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import (
    BlockGradients,
    BlockInputs,
    Dropout,
    ExpertDecoders,
    ExpertFactors,
)
from .routing import Routing, route_rows, sum_choices


class _Kept(NamedTuple):
    """What backward needs beside the inputs.

    Args:
        gate_up: ``[P, 2 I]``, the gate and the up projection's results.
        hidden_gate_up: ``[P, R_gate + R_up]``, the products with LoRA's A.
        hidden_down: ``[P, R_down]``.
        token: ``[P]``, see `Routing`.
        row: ``[T, K]``.
    """

    gate_up: Tensor
    hidden_gate_up: Tensor | None
    hidden_down: Tensor | None
    token: Tensor
    row: Tensor


class ExpertLoop:
    """See the module's docstring, and `expert_path.ExpertPath` for the two calls."""

    def forward(self, inputs: BlockInputs, index: Tensor) -> tuple[Tensor, _Kept, list[int]]:
        """Run the block."""
        x, weight, weights, dropout, lora = inputs
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
        kept = _Kept(gate_up_P2I, hidden_gate_up, hidden_down, routing.token, routing.row)
        return sum_choices(y_PH, routing.row, weight, x.dtype), kept, routing.offsets

    def backward(
        self, inputs: BlockInputs, kept: Sequence[Any], offsets: list[int], grad_TH: Tensor, needs_dx: bool
    ) -> BlockGradients:
        """Gradients of the inputs, from what `forward` gave."""
        x, weight_TK, weights, dropout, lora = inputs
        gate_up_P2I, hidden_gate_up, hidden_down, token_P, row_TK = _Kept(*kept)
        gate_PI, up_PI = gate_up_P2I.chunk(2, dim=1)
        weight_P = weight_TK.new_zeros(len(token_P)).index_copy_(0, row_TK.flatten(), weight_TK.flatten()).to(x.dtype)
        dweight_P = torch.zeros(len(token_P), dtype=torch.float32, device=x.device)
        dx_PH = x.new_empty(len(token_P), x.shape[1]) if needs_dx else None
        dlora = ExpertFactors(*(None if factor is None else torch.zeros_like(factor) for factor in lora))
        step = _ExpertBackward(weights.decoders(x.dtype), dropout, lora, dlora, x, dropout.mask(x.shape, 0, x))
        for expert, rows in Routing(token_P, row_TK, offsets).experts():
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
        dx = None if dx_PH is None else sum_choices(dx_PH, row_TK, None, x.dtype)
        return BlockGradients(dx, dweight_P[row_TK].to(weight_TK.dtype), dlora)


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

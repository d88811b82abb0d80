"""Generation on a CPU: few rows times 4-bit weights, decoded inside bitsandbytes' kernel.

A step of generation has a row or a few for each matrix, and decoding the matrix first takes four times as long as
multiplying with it. The kernel that does both at once wants the codes in an order of its own, so a model that generates
holds a copy of them; long prompts and training go on as without it.

Legend: T tokens, H hidden, I intermediate, K experts a token, S = T·K routed rows, n rows of one expert.
"""

from collections.abc import Sequence
from math import prod

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from . import nf4
from .expert_operands import Projection
from .expert_routing import route_rows, sum_choices
from .weights import NF4Weight

# Up to here it is faster than decoding first: 0.86 against 1.30 ms for 3584 x 1024 on two cores.
MOST_ROWS = 32
# The kernel takes 32 outputs together, two halves of 16: one in the low four bits of its bytes, one in the high four.
_TOGETHER = 32


class FewRows:
    """A copy of a stack of 4-bit matrices ``[G, out, in]`` in the kernel's order.

    Its scales are bfloat16, not float32: a product is off by 0.26 % instead of 0.24 % (root mean square) from the one
    with the decoded weights in float32.

    Args:
        weight: On the CPU, with ``out`` a multiple of 32 and ``in`` one of 64.
    """

    def __init__(self, weight: NF4Weight) -> None:
        groups, rows, columns = weight.shape
        # The kernel's order: [.., 32 outputs, in] to [.., in / 2, 16 outputs, 2].
        low, high = weight.codes.detach().flatten()[: prod(weight.shape) // 2].view(-1, 2, 16, columns // 2).unbind(1)
        even, odd = (low >> 4) | (high & 0xF0), (low & 0xF) | (high << 4)
        self._codes = torch.stack((even, odd), -1).transpose(1, 2).reshape(groups, rows, columns // 2)
        blocks = columns // nf4.BLOCK
        scales = nf4.dequantize_scales(weight.packed()).flatten()[: groups * rows * blocks]
        self._scales = scales.view(groups, rows, blocks).mT.to(torch.bfloat16).contiguous()
        self._source, self._version, self._shape = weight.codes, weight.codes._version, (rows, columns)
        self._code: Tensor = bnb.get_4bit_type("nf4", device="cpu")  # type: ignore[no-untyped-call]  # bitsandbytes is untyped

    def serves(self, rows: Tensor) -> bool:
        """Whether it can stand in for the weight: no gradient is wanted, and the weight is what it was."""
        few = rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and rows[..., 0].numel() <= MOST_ROWS
        return few and not torch.is_grad_enabled() and self._source._version == self._version

    def product(self, rows_nI: Tensor, group: int = 0) -> Tensor:
        """``[.., in]`` bfloat16 times the transposed matrix ``group``: ``[.., out]``."""
        y: Tensor = torch.ops.bitsandbytes.gemv_4bit(
            rows_nI.contiguous(), self._codes[group], self._shape, self._scales[group], self._code, nf4.BLOCK
        )
        return y

    @staticmethod
    def can_hold(weight: NF4Weight) -> bool:
        """Whether there is a kernel for this weight here."""
        if type(weight.codes.data) is not Tensor or weight.codes.device.type != "cpu":
            return False
        _, rows, columns = weight.shape
        fits = rows % _TOGETHER == 0 and columns % nf4.BLOCK == 0
        return fits and bool(bnb.has_avx512bf16())  # type: ignore[no-untyped-call]  # bitsandbytes is untyped

    @staticmethod
    def planned_bytes(weights: Sequence[NF4Weight]) -> int:
        """Bytes of the copies: half a byte a weight, and two bytes for each block's scale."""
        return sum(prod(weight.shape) // 2 + 2 * prod(weight.shape) // nf4.BLOCK for weight in weights)


def experts_of_few_rows(
    x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, projections: Sequence[Projection]
) -> Tensor | None:
    """The expert block for a few tokens without gradients.

    Args:
        x_TH: The tokens, bfloat16.
        index_TK: Their experts, int64.
        weight_TK: And routing weights.
        projections: Gate, up and down.

    Returns:
        ``[T, H]``; ``None`` where the copies are not there or do not serve.
    """
    stacks = [projection.storage.few_rows for projection in projections]
    if not all(stack is not None and stack.serves(x_TH) for stack in stacks):
        return None
    gate, up, down = projections
    routing = route_rows(index_TK, gate.storage.shape[0], padded=False)
    y_SH = x_TH.new_empty(len(routing.token), x_TH.shape[1])
    for expert, rows in routing.experts():
        x_nH = x_TH[routing.token[rows]]
        h_nI = F.silu(_project(gate, x_nH, expert)).mul_(_project(up, x_nH, expert))
        y_SH[rows] = _project(down, h_nI, expert)
    return sum_choices(y_SH, routing.row, weight_TK, x_TH.dtype)


def _project(projection: Projection, rows: Tensor, expert: int) -> Tensor:
    stack = projection.storage.few_rows
    assert stack is not None, "experts_of_few_rows has looked"
    y = stack.product(rows, expert)
    factors = projection.factors(rows.dtype, slice(expert, expert + 1))
    return y if factors is None else y.addmm_(rows @ factors.a[0].t(), factors.b[0].t())

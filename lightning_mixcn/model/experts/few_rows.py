"""Generation on a CPU: few rows times 4-bit weights, decoded inside bitsandbytes' kernel.

A step of generation has a row or a few for each matrix, and decoding the matrix first takes four times as long as
multiplying with it. The kernel that does both at once wants the codes in an order of its own, so a model that generates
holds a copy of them; long prompts and training go on as without it.

Legend: T tokens, H hidden, I intermediate, K experts a token, S = T·K routed rows, n rows of one expert.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .operands import Projection
from .routing import route_rows, sum_choices


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

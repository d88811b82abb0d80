"""Count what each way to compute the expert block needs beside its input and what backward keeps: the one place.

A path of `experts.path.PATHS` has a line in `PATH_MEMORY`; `tests/model/memory/test_paths.py` follows the tensors of
each and compares. Vectors, and tensors as small as a factor's rows, are left out.

Legend: T tokens, H hidden, I intermediate, E experts, S routed rows, n = S / E rows of one expert, c bytes of the
compute dtype.
"""

from collections.abc import Callable
from typing import NamedTuple


class BlockSizes(NamedTuple):
    """Sizes of an expert block and its micro-batch.

    Args:
        tokens: T.
        rows: S, padding on the CPU included.
        hidden: H.
        inner: I.
        experts: E.
        size: c.
        matrix: Bytes of one decoded matrix; 0 where it is stored as it is used.
        scales: Bytes of the decoded scales of all matrices.
        factors: Bytes of all factors in the compute dtype.
        drops_input: LoRA drops rows of x, for gate or up.
        drops_inner: LoRA drops rows of h, for down.
        adapts_inner: LoRA reads rows of h.
        is_packed: Weights are in 4 bits.
    """

    tokens: int
    rows: int
    hidden: int
    inner: int
    experts: int
    size: int
    matrix: int
    scales: int
    factors: int
    drops_input: bool
    drops_inner: bool
    adapts_inner: bool
    is_packed: bool

    @property
    def drops(self) -> bool:
        """LoRA drops any inputs."""
        return self.drops_input or self.drops_inner

    @property
    def rows_hidden(self) -> int:
        """Bytes of ``[S, H]``."""
        return self.rows * self.hidden * self.size

    @property
    def rows_inner(self) -> int:
        """Bytes of ``[S, I]``."""
        return self.rows * self.inner * self.size

    @property
    def tokens_hidden(self) -> int:
        """Bytes of ``[T, H]``."""
        return self.tokens * self.hidden * self.size

    @property
    def each(self) -> int:
        """Rows of one expert when all have equal shares."""
        return self.rows // self.experts

    @property
    def sum_of_choices(self) -> int:
        """Bytes of the float32 sum, one choice in float32, and where that is not c, as it is gathered."""
        return self.tokens * self.hidden * (8 + self.size * (self.size < 4))


class PathMemory(NamedTuple):
    """A path's peaks, in bytes.

    Args:
        forward: Peak of forward beside what it keeps for backward, without its result.
        backward: Peak of backward, with the gradient that comes in and those of the factors, without the result's.
    """

    forward: Callable[[BlockSizes], int]
    backward: Callable[[BlockSizes], int]


def _loop_forward(block: BlockSizes) -> int:
    """Count scales and one expert's tensors, and after gate and up results of all rows, or the sum of choices."""
    each, hidden, inner, drops = block.each, block.hidden, block.inner, block.drops_inner
    # Of an expert's n rows: input [n, H], and with dropout its mask and their product; the mask of all tokens.
    gate_up = block.scales * 2 // 3 + block.tokens_hidden * block.drops
    gate_up += each * hidden * block.size * (1 + 2 * block.drops_input) + block.matrix
    # h [n, I], dropped h; those of the last expert live until the end.
    last = each * (1 + drops) * inner * block.size
    one = last + block.matrix
    if drops:  # h, h dropped of the expert before, the noise and its mask of bytes, while no matrix is there
        one = max(one, last + each * inner * (4 + 1))
    return max(gate_up, block.rows_hidden + block.scales // 3 + max(one, block.sum_of_choices + last))


def _loop_backward(block: BlockSizes) -> int:
    """Count gradients of all rows and factors, scales, and one expert's tensors or the sum of choices."""
    each, hidden, inner, size, drops = block.each, block.hidden, block.inner, block.size, block.drops_inner
    # Of an expert's n rows: the gradient [n, H]; silu, h and dh [n, I], beside dup, dh and dgate of the expert
    # before, which live until their successors are there. With dropout the last six are the new silu, h and dh, the
    # old dup, dgate and mask, while the next mask is made of float32 numbers and bytes.
    one = each * ((6 * size + (4 + 1) * drops) * inner + hidden * size) + block.matrix
    # The last expert's gradient, h, dh, dup and dgate, and its two masks.
    last = each * ((1 + block.drops_input) * hidden + (4 + drops) * inner) * size
    # For each row its dx, its weight in the compute dtype and the float32 gradient of that.
    held = block.rows_hidden + block.rows * (size + 4) + block.factors + block.scales
    held += block.tokens_hidden * (1 + block.drops)  # the gradient that comes in, and the mask
    return held + max(one, block.sum_of_choices + last)


def _fused_operands(block: BlockSizes, matrices: int) -> int:
    """Count decoded matrices with the Bs beside them, and As, in the compute dtype."""
    # Experts' Bs are small beside a matrix, and the As are about half of the factors.
    return matrices * block.hidden * block.inner * block.size + block.factors // 2


def _fused_forward(block: BlockSizes) -> int:
    """Count two operands and one expert's rows of x, and after gate and up results of all rows and one's rows of h."""
    gate_up = _fused_operands(block, 4) + block.each * block.hidden * (1 + block.drops_input) * block.size
    one = block.each * block.inner * (1 + block.drops_inner) * block.size
    return max(gate_up, _fused_operands(block, 2) + block.rows_hidden + max(one, block.tokens_hidden))


def _fused_backward(block: BlockSizes) -> int:
    """Count operands, gradients of all rows and (in float32) of masters, and one expert's tensors."""
    # Of an expert's n rows: the gradient [n, H]; dh, dgate and dup [n, I], what comes through A where rows are dropped,
    # and h again for the factor that reads it.
    width = block.hidden + (3 + block.drops_inner + block.adapts_inner) * block.inner
    held = block.rows_hidden * (1 + block.drops_input) + block.factors // block.size * 4 + block.tokens_hidden
    return _fused_operands(block, 3) + held + max(block.each * width * block.size, block.tokens_hidden)


def _grouped_forward(block: BlockSizes, stack: int) -> int:
    """Count h and results of all rows, and a decoded stack, what is dropped, or the sum of choices."""
    masked = block.rows_inner * block.drops_inner
    # With dropout: masks of all experts, and those side by side.
    return block.rows_inner + block.rows_hidden + max(stack, 2 * masked, block.sum_of_choices + masked)


def _grouped_backward(block: BlockSizes, stack: int) -> int:
    """Count gradients of all rows and factors, and a decoded stack or the sum of choices."""
    hidden, inner = block.rows_hidden, block.rows_inner
    mask, drops = inner * block.drops_inner, block.drops_input  # h's mask is there to the end
    moments = (
        hidden + inner + stack,  # the product with down
        hidden + 3 * inner + 2 * mask,  # h, dgate and dup; h dropped, and the mask
        2 * inner + mask + 2 * hidden + stack,  # the product with up beside that with gate
        2 * inner + mask + (2 + 2 * drops) * hidden + block.tokens_hidden * drops,  # rows of x as A reads them
        2 * inner + mask + hidden + block.tokens_hidden * drops + block.sum_of_choices,
    )
    return block.tokens_hidden + block.factors + max(moments)


def _stack(block: BlockSizes) -> int:
    return block.experts * block.matrix


def _stack_of_decode(block: BlockSizes) -> int:
    """Return the bytes of a stack that its kernel cannot read as it is: one in another dtype."""
    return 0 if block.is_packed else _stack(block)


PATH_MEMORY = {
    "loop": PathMemory(_loop_forward, _loop_backward),
    "fused": PathMemory(_fused_forward, _fused_backward),
    "grouped": PathMemory(
        lambda block: _grouped_forward(block, _stack(block)), lambda block: _grouped_backward(block, _stack(block))
    ),
    "decode": PathMemory(
        lambda block: _grouped_forward(block, _stack_of_decode(block)),
        lambda block: _grouped_backward(block, _stack_of_decode(block)),
    ),
}

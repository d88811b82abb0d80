"""Rotary position embedding of queries and keys in one pass, and its backward, the rotation by minus the angle.

Inside, all is float32 and rounded once; transformers' ``apply_rotary_pos_emb`` has the formula in torch.

Legend: B rows, S positions, N = B·S tokens, D head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotate(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    backwards: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs ``(d, d + D/2)`` of each head.

    Args:
        query: ``[B, S, heads, D]``, heads contiguous; rows may be those of a wider matrix.
        key: ``[B, S, key-value heads, D]``, as ``query``.
        cos: ``[B, S, D]`` or ``[1, S, D]``, contiguous, the same in both halves of D.
        sin: The same of the sines.
        backwards: Rotate by minus the angle.
        out: Results, laid out as their arguments may be; ``query`` and ``key`` themselves are possible.

    Returns:
        Both rotated, in their dtypes; ``out``, or contiguous.
    """
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    rotated = out or (query.new_empty(query.shape), key.new_empty(key.shape))
    rows_N, keys_N = query.flatten(0, 1), key.flatten(0, 1)
    to_query_N, to_key_N = (state.flatten(0, 1) for state in rotated)
    if query.is_meta or len(rows_N) == 0:
        return rotated
    size = query.shape[3]
    assert all(rows.stride()[1:] == (size, 1) for rows in (rows_N, keys_N, to_query_N, to_key_N))
    table = cos.shape[0] * cos.shape[1]
    with torch.cuda.device_of(query):  # Triton launches on the current device, whatever its arguments are on
        _rotate[(len(rows_N),)](
            rows_N, keys_N, cos, sin, to_query_N, to_key_N, rows_N.stride(0), keys_N.stride(0),
            to_query_N.stride(0), to_key_N.stride(0), table,
            HEADS=query.shape[2], KEY_HEADS=key.shape[2], SIZE=size, BACKWARDS=backwards,
        )  # fmt: skip
    return rotated


@triton.jit(do_not_specialize=["table"])
def _rotate(
    query, key, cos, sin, rotated_query, rotated_key, query_stride, key_stride, to_query_stride, to_key_stride, table,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, triton.next_power_of_2(SIZE // 2))[None, :]
    place = (row % table) * SIZE + column
    c = tl.load(cos + place, mask=column < SIZE // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + place, mask=column < SIZE // 2, other=0.0).to(tl.float32)
    if BACKWARDS:
        s = -s
    _rotate_heads(query + row * query_stride, rotated_query + row * to_query_stride, c, s, column, HEADS, SIZE)
    _rotate_heads(key + row * key_stride, rotated_key + row * to_key_stride, c, s, column, KEY_HEADS, SIZE)


@triton.jit
def _rotate_heads(heads, out, c, s, column, COUNT: tl.constexpr, SIZE: tl.constexpr):
    head = tl.arange(0, triton.next_power_of_2(COUNT))[:, None]
    first = head * SIZE + column
    inside = (head < COUNT) & (column < SIZE // 2)
    a = tl.load(heads + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(heads + first + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + first + SIZE // 2, (b * c + a * s).to(out.dtype.element_ty), mask=inside)

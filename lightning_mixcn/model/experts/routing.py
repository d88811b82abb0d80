"""Token of each row of the expert block: rows are sorted by expert, once.

Legend: T tokens, H hidden, E experts, K experts a token, S = T·K routed rows, P = rows with each expert's share padded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


def padded_rows(rows: int) -> int:
    """Round up one expert's rows, on the CPU in 16 bits: to a power of two up to 32, then by `row_step`."""
    if rows < 32:
        return 1 << (rows - 1).bit_length() if rows else 0
    step = row_step(rows)
    return -(-rows // step) * step


def row_step(rows: int) -> int:
    """Return 16 up to 128 rows, 32 up to 1,024, and above a 32nd of the next power of two.

    oneDNN builds a kernel for each new row count of each product, which takes more than a millisecond and 0.6 MB, 17
    times an expert and step. It keeps 1,024 of them: with more counts it would build them again and again. Few counts,
    then; but small experts have about a hundred rows, a quarter of which would be padding in steps of 32.
    """
    return 16 if rows <= 128 else max(32, 1 << ((rows - 1).bit_length() - 5))


def choose_experts(logits_TE: Tensor, top_k: int, *, normalises: bool) -> tuple[Tensor, Tensor]:
    """Return the weights of each token's experts ``[T, K]`` float32, and their numbers ``[T, K]`` int64.

    Args:
        logits_TE: Router logits, any float dtype.
        top_k: K.
        normalises: Divide the weights by their sum.
    """
    weights_TK, index_TK = torch.topk(logits_TE.float().softmax(dim=-1), top_k, dim=-1)
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True) if normalises else weights_TK, index_TK


@dataclass
class Routing:
    """Tokens of the rows, expert by expert.

    Args:
        token: ``[P]`` int64, the token of each row; 0 in padding, whose routing weight and gradient are 0.
        row: ``[T, K]`` int64, the row of a token's k-th choice.
        offsets: ``E + 1`` row offsets of the experts.
    """

    token: Tensor
    row: Tensor
    offsets: list[int]

    def experts(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has rows, with them."""
        for expert, (start, stop) in enumerate(pairwise(self.offsets)):
            if stop > start:
                yield expert, slice(start, stop)


class DeviceRouting(NamedTuple):
    """Tokens of the rows, without padding and without the host knowing how many rows an expert has.

    Args:
        token: ``[S]`` int64, the token of each row.
        row: ``[T, K]`` int64, the row of a token's k-th choice.
        ends: ``[E]`` int32, the row after each expert's last.
    """

    token: Tensor
    row: Tensor
    ends: Tensor


def route_rows_on_device(index_TK: Tensor, num_experts: int) -> DeviceRouting:
    """Sort the routed rows by expert, once; no host synchronisation."""
    expert_S = index_TK.reshape(-1)
    sorted_S, order_S = torch.sort(expert_S, stable=True)
    experts_E = torch.arange(num_experts, device=expert_S.device)
    # A search instead of `bincount`, which asks the device for the largest expert.
    ends_E = torch.searchsorted(sorted_S, experts_E, right=True, out_int32=True)
    place_S = torch.arange(expert_S.numel(), device=expert_S.device)
    row_S = torch.empty_like(order_S).index_copy_(0, order_S, place_S)
    return DeviceRouting(order_S // index_TK.shape[1], row_S.view_as(index_TK), ends_E)


def route_rows(index_TK: Tensor, num_experts: int, padded: bool) -> Routing:
    """Sort the routed rows by expert and read each one's rows, by one synchronisation.

    Args:
        index_TK: Chosen experts, int64.
        num_experts: E.
        padded: Apply `padded_rows`, on the CPU.
    """
    token_S, row_TK, ends_E = route_rows_on_device(index_TK, num_experts)
    offsets = [0, *ends_E.tolist()]
    if not padded:
        return Routing(token_S, row_TK, offsets)
    places = [0, *accumulate(padded_rows(stop - start) for start, stop in pairwise(offsets))]
    shift_E = torch.tensor([place - offset for place, offset in zip(places, offsets, strict=True)][:-1])
    row_TK = row_TK + shift_E[index_TK]
    # Each choice's row gets its token.
    tokens_TK = torch.arange(len(index_TK))[:, None].expand_as(index_TK)
    token_P = token_S.new_zeros(places[-1]).index_copy_(0, row_TK.flatten(), tokens_TK.flatten())
    return Routing(token_P, row_TK, places)


def sum_choices(rows_PH: Tensor, row_TK: Tensor, weight_TK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum weight · row over each token's K rows, in float32; a gather, so that the order of the sum is fixed."""
    # On the CPU `index_select` copies whole rows, seven times as fast as `rows[index]`.
    total: Tensor | None = None
    for k in range(row_TK.shape[1]):
        rows = rows_PH.index_select(0, row_TK[:, k]).float()
        rows = rows if weight_TK is None else rows.mul_(weight_TK[:, k, None])
        total = rows if total is None else total.add_(rows)
    assert total is not None, "top-k is at least 1"
    return total.to(dtype)

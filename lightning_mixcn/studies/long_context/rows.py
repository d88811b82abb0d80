"""Scores of long rows on all ranks: as many forward passes on each, and one opinion about memory.

Legend: N tokens of a row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp

from lightning_mixcn.model.inference.prefill import ChunkedPrefill, ChunkScores
from lightning_mixcn.studies.processes import over_ranks

_FITS = 2**62
Result = TypeVar("Result")


class RowScores(NamedTuple):
    """Scores of the tokens 1 to N − 1 of a row, each given all before it, on the CPU.

    Args:
        nats: float64 ``[N - 1]``, negative log-likelihoods.
        is_argmax: bool ``[N - 1]``, whether the token is the model's most likely one.
    """

    nats: Tensor
    is_argmax: Tensor


class ContextTooLongError(Exception):
    """A context did not fit into the memory of some rank; raised on all of them.

    Args:
        tokens: Length of that context.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__(f"a context of {tokens} tokens does not fit into memory")
        self.tokens = tokens


def score_rows(model: nn.Module, rows: Sequence[Tensor], chunk: int) -> list[RowScores]:
    """Score this rank's rows; all ranks call it, each with rows of its own, or none.

    Under FSDP a forward pass is a conversation of all ranks, so those with less to do take part with single tokens that
    count nowhere.

    Args:
        model: A model of `load_moe` or the PeftModel around it, in evaluation mode.
        rows: int64 ``[N]`` each.
        chunk: Tokens of a forward pass.

    Returns:
        Scores of each of the rows.

    Raises:
        ContextTooLongError: on all ranks, if the cache or a forward pass found no memory on one. (A rank that fails
            within a forward pass of a *sharded* model leaves the others waiting, as in training; the cache, which
            grows with the length, is allocated before.)
    """
    device = next(model.parameters()).device
    wanted = torch.tensor(sum(-(-len(row) // chunk) for row in rows), device=device)
    forwards = int(over_ranks(wanted, ReduceOp.MAX))
    longest = max(map(len, rows), default=1)
    prefill = _agree(lambda: ChunkedPrefill(model, longest), longest, device)
    scores: list[RowScores] = []
    for row in rows:
        prefill.restart()
        parts = []
        for start in range(0, len(row), chunk):
            ids_C, next_C = row[start : start + chunk], row[start + 1 : start + 1 + chunk]
            parts.append(_agree(lambda: prefill.advance(ids_C, next_C), start + len(ids_C), device))  # noqa: B023  # called at once
        scores.append(RowScores(*(torch.cat(part).cpu() for part in zip(*parts, strict=True))))
    one = torch.zeros(1, dtype=torch.int64)
    for _ in range(forwards - int(wanted)):
        prefill.restart()
        _agree(lambda: prefill.advance(one, one[:0]), 1, device)
    return scores


def as_far_as_memory_goes(
    lengths: Sequence[int], attempt: Callable[[Sequence[int]], Result]
) -> tuple[Result | None, list[int]]:
    """Evaluate lengths together, and again without the longest ones if these do not fit.

    Args:
        lengths: Tokens, ascending.
        attempt: Evaluates some of them on all ranks.

    Returns:
        What it gave, or ``None`` if not even the shortest fits; and the lengths that were left out.
    """
    left = list(lengths)
    while left:
        try:
            return attempt(left), [length for length in lengths if length not in left]
        except ContextTooLongError:
            # Only the longest goes: a short context, too, can fail because of the cache for a long one.
            left.pop()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None, list(lengths)


Made = TypeVar("Made", ChunkedPrefill, ChunkScores)


def _agree(work: Callable[[], Made], tokens: int, device: torch.device) -> Made:
    """Do a rank's part of something, and go on only if memory sufficed on all of them."""
    made = None
    try:
        made = work()
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
    too_long = int(over_ranks(torch.tensor(tokens if made is None else _FITS, device=device), ReduceOp.MIN))
    if made is None or too_long < _FITS:
        raise ContextTooLongError(too_long)
    return made

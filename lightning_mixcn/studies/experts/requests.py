"""Log-likelihoods of multiple choice, with every expert of every layer disabled in turn.

A benchmark's choices are rows of tokens of which the last ones are scored. Choices that differ in their last token only
(the letters A to D) are one row. They run through `DisabledPasses` as text does, so layers below are computed once.

Likelihoods are computed as lm-evaluation-harness computes them, in the type of the logits, so that accuracies are its.

Legend: B rows, S positions, H hidden, D requests of a batch, V variants (mode and expert) of a layer.
"""

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_mixcn.errors import NonFiniteError

from .disabling import Batch, DisabledPasses, Mode
from .flops import StudyFlops, pairs_of_rows

Arrays = dict[str, NDArray[Any]]
Request = tuple[Sequence[int], Sequence[int]]


class RequestRow(NamedTuple):
    """A row of tokens and what is scored after it.

    Args:
        ids: Tokens that the model reads.
        requests: Number of each request, and the tokens that are scored: the last of them follows the row, those before
            are its end.
    """

    ids: tuple[int, ...]
    requests: list[tuple[int, tuple[int, ...]]]


class RequestScores:
    """Scores requests as they are and without each expert, batch by batch.

    Args:
        model: A model of `load_moe` or the PeftModel around it, in evaluation mode.
        modes: Ways of disabling experts.
        requests: Tokens of each context and of its continuation, neither empty.
        max_tokens: Tokens that the model reads; a longer row loses its beginning.
        micro_batch_size: Rows of a batch.

    Attributes:
        prompts_cut: Requests that were longer than the model reads, and lost their beginning.
    """

    def __init__(
        self,
        model: nn.Module,
        modes: Sequence[Mode],
        requests: Sequence[Request],
        max_tokens: int,
        micro_batch_size: int,
    ) -> None:
        """Lay out the rows; nothing is computed yet."""
        self._passes = DisabledPasses(model, modes, micro_batch_size)
        self.flops = StudyFlops(self._passes.forward, self._passes.num_experts, len(modes), "mask" in modes, 0)
        rows = request_rows(requests, max_tokens)
        self.prompts_cut = sum(len(context) + len(tokens) > max_tokens + 1 for context, tokens in requests)
        rows.sort(key=lambda row: -len(row.ids))  # rows of a batch are of like lengths
        self._batches = [rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)]

    def __len__(self) -> int:
        """Count the batches."""
        return len(self._batches)

    def size(self, number: int) -> tuple[int, int]:
        """Return tokens of a batch with its padding, and pairs that attention compares, as `StudyFlops` takes them."""
        batch = self._batch(number)
        return batch["input_ids"].numel(), sum(pairs_of_rows(batch["position_ids"]))

    @torch.no_grad()
    def evaluate(self, number: int) -> Arrays:
        """Score a batch as the model is.

        Returns:
            ``request`` int64 ``[D]``, numbers of the requests; ``scores`` float64 ``[D]``, their log-likelihoods in
            nats; ``flops`` and ``seconds``.

        Raises:
            FloatingPointError: a likelihood is not finite.
        """
        start, batch, rows = perf_counter(), self._passes.on_device(self._batch(number)), self._batches[number]
        scores = [self._score(row, hidden_SH) for row, hidden_SH in zip(rows, self._passes.whole(batch), strict=True)]
        numbers = [request for row in rows for request, _ in row.requests]
        made = {"request": np.array(numbers), "scores": _finite(torch.cat(scores), "of the unchanged model")}
        return made | _spent(self.flops.base(*self.size(number)), start)

    @torch.no_grad()
    def disable(self, number: int, evaluated: Arrays, layers: Sequence[int]) -> Iterator[tuple[int, Arrays]]:
        """Score a batch without each expert of some layers.

        Args:
            number: Number of the batch.
            evaluated: Result of `evaluate`.
            layers: Numbers of the layers, ascending.

        Yields:
            Number of a layer, and ``scores`` float64 ``[V, D]``, ``flops`` and ``seconds``.

        Raises:
            FloatingPointError: a likelihood is not finite.
        """
        start, batch, rows = perf_counter(), self._passes.on_device(self._batch(number)), self._batches[number]
        firsts = np.cumsum([0] + [len(row.requests) for row in rows])
        pairs, forward = pairs_of_rows(batch["position_ids"]), self._passes.forward
        for place, layer in self._passes.layers(batch, layers, self._passes.variants):
            scores_VD = np.repeat(evaluated["scores"][None], len(self._passes.variants), axis=0)
            length = batch["input_ids"].shape[1]
            flops = forward.layer(place, batch["input_ids"].numel(), sum(pairs), layer.computed_rows)
            for units, hidden_nSH in self._passes.above(place, layer, batch):
                for (variant, row), hidden_SH in zip(units, hidden_nSH, strict=True):
                    found = _finite(self._score(rows[row], hidden_SH), f"without an expert of layer {place}")
                    scores_VD[variant, firsts[row] : firsts[row + 1]] = found
                flops += forward.above(place, length * len(units), sum(pairs[row] for _, row in units))
            yield place, {"scores": scores_VD} | _spent(flops, start)
            start = perf_counter()

    def _score(self, row: RequestRow, hidden_SH: Tensor) -> Tensor:
        """Return log-likelihood of each request of a row, from what the head is given of it."""
        longest = max(len(tokens) for _, tokens in row.requests)
        end = len(row.ids)
        logits_PV = self._passes.base.lm_head(hidden_SH[None, end - longest : end])[0]
        likelihood_PV = torch.log_softmax(logits_PV, dim=-1)
        scores = []
        for _, tokens in row.requests:
            chosen_n1 = torch.tensor(tokens, device=likelihood_PV.device)[:, None]
            scores.append(likelihood_PV[-len(tokens) :].gather(1, chosen_n1).sum())
        return torch.stack(scores)

    def _batch(self, number: int) -> Batch:
        """Return ``input_ids``, ``position_ids`` and ``document_ids``; padding to the right is another document."""
        rows = self._batches[number]
        longest = max(len(row.ids) for row in rows)
        shape = len(rows), longest
        batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "position_ids", "document_ids")}
        for place, row in enumerate(rows):
            length = len(row.ids)
            batch["input_ids"][place, :length] = torch.tensor(row.ids)
            batch["position_ids"][place] = torch.cat([torch.arange(length), torch.arange(longest - length)])
            batch["document_ids"][place, length:] = -1
        return batch


def request_rows(requests: Sequence[Request], max_tokens: int) -> list[RequestRow]:
    """Return the different rows that requests need.

    Args:
        requests: Tokens of context and continuation.
        max_tokens: Tokens of a row at most.

    >>> request_rows([([5, 6], [7]), ([5, 6], [8]), ([5], [6, 9])], 10)
    [RequestRow(ids=(5, 6), requests=[(0, (7,)), (1, (8,)), (2, (6, 9))])]
    """
    rows: dict[tuple[int, ...], RequestRow] = {}
    for number, (context, continuation) in enumerate(requests):
        ids = tuple([*context, *continuation][-(max_tokens + 1) :][:-1])
        rows.setdefault(ids, RequestRow(ids, [])).requests.append((number, tuple(continuation)))
    return list(rows.values())


def _finite(scores: Tensor, whose: str) -> NDArray[np.float64]:
    found: NDArray[np.float64] = scores.double().cpu().numpy()
    if not np.isfinite(found).all():
        raise NonFiniteError(f"a log-likelihood {whose} is not finite. Use `dtype` bfloat16 or float32")
    return found


def _spent(flops: int, start: float) -> Arrays:
    return {"flops": np.array(flops), "seconds": np.array(perf_counter() - start)}

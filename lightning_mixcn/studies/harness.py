"""Our model as lm-evaluation-harness takes one: its own wrapper of transformers models, made for several ranks.

Imported only where the harness is installed.

Legend: B rows of a batch, S positions, V vocabulary, R ranks, N = ceil(B / R) rows of a rank.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from lightning_mixcn.studies.processes import is_first
from lightning_mixcn.text import TextTokenizer

from .tasks import harness_messages

RequestPair = tuple[Sequence[int], Sequence[int]]


class HarnessModel(HFLM):  # type: ignore[misc]  # published without types
    """The harness's `HFLM` around a model as `load_moe` gives it: 4-bit, with adapters, perhaps sharded.

    All ranks run the same documents, so that each makes as many forward passes, which a sharded model needs. The rows
    of a batch of log-likelihoods are dealt to the ranks and the logits gathered; generation is repeated on each rank.

    Args:
        model: In evaluation mode; its adapters count unless they are switched off around the call.
        tokenizer: The model's.
        batch_size: Rows of a batch over all ranks, or ``auto``, which tries what memory holds.
    """

    def __init__(self, model: nn.Module, tokenizer: TextTokenizer, batch_size: int | str = 1) -> None:
        """Wrap the model, without a copy."""
        self._ranks, self._own_rank = 1, 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._ranks, self._own_rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        with harness_messages():
            super().__init__(pretrained=model, tokenizer=tokenizer.hf, batch_size=batch_size)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return logits ``[B, S, V]`` of ``inps [B, S]``, each rank computing ``[N, S, V]`` of them."""
        if self._ranks == 1:
            logits_BSV: Tensor = super()._model_call(inps, *args, **kwargs)
            return logits_BSV
        count = -(-len(inps) // self._ranks)
        # The last ranks repeat the last row where rows do not go round.
        places_N = (torch.arange(count) * self._ranks + self._own_rank).clamp_max(len(inps) - 1)
        mine_NSV = super()._model_call(inps[places_N.to(inps.device)], *args, **kwargs).contiguous()
        parts = [torch.empty_like(mine_NSV) for _ in range(self._ranks)]
        torch.distributed.all_gather(parts, mine_NSV)
        return torch.stack(parts, dim=1).flatten(0, 1)[: len(inps)]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Continue ``context [B, S]``; on several ranks none stops before all do."""
        if self._ranks > 1:
            generation_kwargs["synced_gpus"] = True
        with torch.no_grad():
            generated: Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
        return generated


Answer = tuple[float, bool]


class HarnessReplicas(HFLM):  # type: ignore[misc]  # published without types
    """The harness's `HFLM` around a model as `load_moe` gives it, of which every process has a copy.

    All processes lay out the same batches in the same order, and each computes every N-th of them, so the batches, and
    with them all figures, are those of one process to the last bit. The answers are then exchanged.

    Args:
        model: In evaluation mode; its adapters count unless they are switched off around the call.
        tokenizer: The model's.
        batch_size: Rows of a batch, or in one process ``auto``, which tries what memory holds.
    """

    def __init__(self, model: nn.Module, tokenizer: TextTokenizer, batch_size: int | str = 1) -> None:
        """Wrap the model, without a copy."""
        self._processes, self._own, self._next_batch = 1, 0, 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._processes, self._own = torch.distributed.get_world_size(), torch.distributed.get_rank()
        with harness_messages():
            super().__init__(pretrained=model, tokenizer=tokenizer.hf, batch_size=batch_size)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return answers to all requests; where another process generates, nothing was generated here."""
        mine: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm or not is_first())
        return [max(answers, key=len) for answers in self._of_all(mine)]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> list[Answer]:
        mine = super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm or not is_first(), **options)
        return [next((one for one in answers if not math.isnan(one[0])), answers[0]) for answers in self._of_all(mine)]

    def _of_all(self, mine: list[Any]) -> list[tuple[Any, ...]]:
        """Return every process's answer to each request."""
        if self._processes == 1:
            return [(answer,) for answer in mine]
        answers: list[Any] = [None] * self._processes
        torch.distributed.all_gather_object(answers, mine)
        return list(zip(*answers, strict=True))

    def _is_mine(self) -> bool:
        """Tell whether the next batch is this process's."""
        self._next_batch += 1
        return (self._next_batch - 1) % self._processes == self._own

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return logits ``[B, S, V]`` of ``inps [B, S]``; NaN where another process computes them."""
        if self._is_mine():
            logits_BSV: Tensor = super()._model_call(inps, *args, **kwargs)
            return logits_BSV
        return torch.full((1, 1, 1), math.nan, device=inps.device).expand(*inps.shape, self.model.config.vocab_size)

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Continue ``context [B, S]``; where another process does, it is left as it is."""
        if not self._is_mine():
            return context
        with torch.no_grad():
            generated: Tensor = super()._model_generate(context, *args, **kwargs)
        return generated


class RequestTokens(HarnessModel):
    """Model of the harness that writes down what it is asked instead of answering."""

    def tokens(self, instances: Sequence[Any]) -> list[RequestPair]:
        """Return the tokens of each request's context and continuation, cut as the harness cuts them."""
        self._asked: list[RequestPair] = []
        self.loglikelihood(list(instances), disable_tqdm=True)
        return self._asked

    def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> list[tuple[float, bool]]:
        self._asked = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return [(0.0, False)] * len(self._asked)

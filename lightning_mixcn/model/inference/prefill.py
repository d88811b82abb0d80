"""Compute the likelihood of rows of any length, a chunk at a time over a key-value cache that is filled in place.

One forward pass of N tokens holds logits ``[N, V]``, and a cache that grows is copied whenever it does. Here memory is
the cache, allocated once, and the logits of one chunk.

Legend: N tokens of a row, C tokens of a chunk, V vocabulary, L tokens in the cache, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.architectures.record import head_size
from lightning_mixcn.model.attention.documents import no_mask
from lightning_mixcn.model.causal_lm import CACHE_ARGUMENT, base_of

_NAME = "prefill_sdpa"
# Logits in float32 at a time: 24 MiB at a vocabulary of 49,152.
_SOFTMAX_ROWS = 128


def default_chunk(device: torch.device) -> int:
    """Return the tokens of a forward pass that are fast enough where nobody said.

    On a GPU, whose every chunk decodes all weights: some 0.1 s for Mixtral-8x7B, as long as the products of a thousand
    tokens take.

    Args:
        device: Device of the model.
    """
    return 4096 if device.type == "cuda" else 512


class ChunkScores(NamedTuple):
    """Scores of the tokens that follow each position of a chunk.

    Args:
        nats: float64 ``[C]``, negative log-likelihood of each following token.
        is_argmax: bool ``[C]``, true where the following token is the most likely one, which greedy decoding takes.
    """

    nats: Tensor
    is_argmax: Tensor


class ChunkedPrefill:
    """A model and its cache, for one row after another. Use it in evaluation mode and without gradients.

    Args:
        model: A model of `load_moe`, or the PeftModel around it.
        max_tokens: Tokens of the longest row; the cache takes ``2 * layers * key-value heads * head size`` numbers of
            the compute dtype for each, and where there is no CUDA a mask takes one for each token of a chunk.

    Raises:
        ValueError: the model has a sliding window shorter than ``max_tokens``.
        torch.OutOfMemoryError: there is no room for the cache.
    """

    def __init__(self, model: nn.Module, max_tokens: int) -> None:
        """Allocate the cache."""
        self.model, self.max_tokens = model, max_tokens
        base: Any = base_of(model)
        config, embedding = base.config, base.get_input_embeddings()
        window = getattr(config, "sliding_window", None)
        if window is not None and window < max_tokens:
            raise UserError(
                f"config.sliding_window={window} is shorter than a row of {max_tokens} tokens. "
                "Evaluate shorter rows, or set it to null in config.json if the model attends to all of a row"
            )
        shape = (1, config.num_key_value_heads, max_tokens, head_size(config))
        self.config, self.device = config, embedding.weight.device
        self._layers = [
            _FilledLayer(shape, embedding.output_dtype, self.device) for _ in range(config.num_hidden_layers)
        ]
        self._cache = Cache(layers=list(self._layers))
        self._masks_CL = torch.empty(0, max_tokens, dtype=embedding.output_dtype, device=self.device)

    @property
    def tokens(self) -> int:
        """Tokens of the row that the cache holds."""
        return self._layers[0].length

    def restart(self) -> None:
        """Begin another row."""
        for layer in self._layers:
            layer.length = 0

    def advance(self, ids_C: Tensor, next_C: Tensor) -> ChunkScores:
        """Run one chunk of a row after what the cache holds.

        Args:
            ids_C: int64 ``[C]``, the chunk.
            next_C: int64 ``[C]``, the token after each position; one less where the row ends.

        Returns:
            Scores of ``next_C``, on the model's device.
        """
        assert self.tokens + len(ids_C) <= self.max_tokens, "the cache is made for shorter rows"
        with _prefill_attention(self.config):
            output = self.model(
                input_ids=ids_C[None].to(self.device),
                use_cache=True,
                attention_mask=self._mask(len(ids_C)),
                output_router_logits=False,
                **{CACHE_ARGUMENT: self._cache},
            )
        return _score(output.logits[0], next_C.to(self.device))

    def _mask(self, chunk: int) -> Tensor:
        """Return what is added to the products of queries and keys ``[1, 1, C, L]``; empty on CUDA, which needs none.

        Having four dimensions, it keeps transformers from making one. It is a window of one tensor for the longest row:
        masks that are made for each chunk grow with the row, and what the C library has freed of one is too small for
        the next.
        """
        if self.device.type == "cuda":
            return no_mask(self.device)
        if len(self._masks_CL) < chunk:
            never = self._masks_CL.new_full((chunk, self.max_tokens), -torch.inf)
            self._masks_CL = never.triu(self.max_tokens - chunk + 1)
        return self._masks_CL[None, None, -chunk:, self.max_tokens - self.tokens - chunk :]


def _score(logits_CV: Tensor, next_C: Tensor) -> ChunkScores:
    nats, is_argmax = [next_C.new_zeros(0, dtype=torch.float64)], [next_C.new_zeros(0, dtype=torch.bool)]
    for start in range(0, len(next_C), _SOFTMAX_ROWS):
        rows = slice(start, min(start + _SOFTMAX_ROWS, len(next_C)))
        logits_PV, next_P = logits_CV[rows].float(), next_C[rows]
        nats.append(F.cross_entropy(logits_PV, next_P, reduction="none").double())
        is_argmax.append(logits_PV.argmax(1) == next_P)
    return ChunkScores(torch.cat(nats), torch.cat(is_argmax))


class _FilledLayer(CacheLayerMixin):
    """Keys and values of one layer ``[1, heads, max_tokens, D]``; what is filled is handed out as a view."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.all_keys = torch.empty(shape, dtype=dtype, device=device)
        self.all_values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there is room from the beginning."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stop = self.length + key_states.shape[2]
        self.all_keys[:, :, self.length : stop] = key_states
        self.all_values[:, :, self.length : stop] = value_states
        self.length = stop
        return self.all_keys[:, :, :stop], self.all_values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return int(self.all_keys.shape[2])


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally from a chunk ``[1, heads, C, D]``, the end of the row, to all of the row ``[1, heads, L, D]``.

    CUDA's flash attention does this without a mask, which is empty; the CPU's reads one. Neither holds the products
    ``[heads, C, L]``.
    """
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask if attention_mask.numel() else causal_lower_right(query.shape[2], key.shape[2]),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2), None


@contextmanager
def _prefill_attention(config: Any) -> Iterator[None]:
    """Let the model attend by `_attention`; the layers read the name from the configuration that they share."""
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)

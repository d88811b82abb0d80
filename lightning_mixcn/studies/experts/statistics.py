"""Bits per byte without each expert, and how sure that is: a bootstrap over documents.

Efron and Tibshirani, An Introduction to the Bootstrap, 1993: documents are drawn with replacement, and the ratio of
sums is computed again. Tokens would be no units to draw: those of one document go together.

Legend: G sources, V variants, D documents of a source, R resamples.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_mixcn.model.causal_lm import base_of

Floats = NDArray[np.float64]
_RESAMPLES, _AT_A_TIME = 2000, 250
_TAILS = (2.5, 97.5)


class SourceDocuments(NamedTuple):
    """The documents of a source, and how each variant changes them.

    Args:
        nats: float64 ``[D]``, of the model as it is, over all labels.
        text_nats: float64 ``[D]``, over text alone.
        tokens: int64 ``[D]``, labels.
        bytes: int64 ``[D]``, UTF-8 bytes of text.
        changed_nats: float64 ``[V, D]``, what is added to ``nats``.
        changed_text_nats: float64 ``[V, D]``, what is added to ``text_nats``.
    """

    nats: Floats
    text_nats: Floats
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]
    changed_nats: Floats
    changed_text_nats: Floats


class Change(NamedTuple):
    """How much more a source costs without each expert, or the difference of two sources.

    Args:
        bits_per_byte: float64 ``[V]``.
        low: float64 ``[V]``, lower end of the 95 % interval; NaN where a source has one document only.
        high: float64 ``[V]``, upper end.
    """

    bits_per_byte: Floats
    low: Floats
    high: Floats

    def is_clear(self) -> NDArray[np.bool_]:
        """Tell whether the interval leaves out 0, ``[V]``."""
        return (self.low > 0) | (self.high < 0)


class Intervals:
    """Changes of all sources, from one set of resamples each.

    Args:
        sources: Documents of each source.
        seed: Seed of the resampling; the same documents and seed give the same intervals.
    """

    def __init__(self, sources: Sequence[SourceDocuments], seed: int = 0) -> None:
        """Draw the resamples."""
        self._points = [_bits(part.changed_text_nats.sum(1), part.bytes.sum()) for part in sources]
        self._resampled = [_resample(part, np.random.default_rng([seed, place])) for place, part in enumerate(sources)]

    def of(self, source: int) -> Change:
        """Return the change of one source, with its interval."""
        return Change(self._points[source], *np.percentile(self._resampled[source], _TAILS, axis=0))

    def difference(self, source: int, other: int) -> Change:
        """Return the change of one source less that of another, whose documents are drawn independently."""
        resampled_RV = self._resampled[source] - self._resampled[other]
        return Change(self._points[source] - self._points[other], *np.percentile(resampled_RV, _TAILS, axis=0))


def _resample(part: SourceDocuments, random: np.random.Generator) -> Floats:
    """Return bits per byte of the resamples, ``[R, V]``."""
    documents = len(part.bytes)
    if documents < 2:
        return np.full((_RESAMPLES, len(part.changed_text_nats)), math.nan)
    drawn = []
    for _ in range(_RESAMPLES // _AT_A_TIME):
        times_RD = random.multinomial(documents, np.full(documents, 1 / documents), size=_AT_A_TIME)
        # A draw of nothing but empty documents has no bits per byte; it counts as one byte.
        drawn.append(_bits(times_RD @ part.changed_text_nats.T, np.maximum(times_RD @ part.bytes, 1)[:, None]))
    return np.concatenate(drawn)


def _bits(nats: Floats, text_bytes: NDArray[np.int64]) -> Floats:
    result: Floats = nats / math.log(2) / text_bytes
    return result


# Elements of all experts' matrices compared at a time, in float32: 128 MiB.
_CHUNK = 2**25


@torch.no_grad()
def weight_cosines(model: nn.Module, layer: int) -> Tensor:
    """Return the cosine between the weights of two experts of a layer, the mean over gate, up and down.

    Args:
        model: A model of `load_moe` or the PeftModel around it; 4-bit weights are decoded, adapters added.
        layer: Its number.

    Returns:
        float64 ``[E, E]`` on the CPU; 0 beside a matrix of zeros.
    """
    base: Any = base_of(model)
    experts = base.model.layers[layer].mlp.experts
    dtype = base.model.embed_tokens.output_dtype
    cosines = [_cosines(projection, dtype) for projection in (experts.gate_proj, experts.up_proj, experts.down_proj)]
    return torch.stack(cosines).mean(0)


def _cosines(projection: Any, dtype: torch.dtype) -> Tensor:
    groups, rows, columns = projection.storage.shape
    decode: Callable[[int], Tensor] = projection.storage.decoder(dtype)
    matrices_OI = [decode(expert) for expert in range(groups)]
    factors = projection.factors(torch.float32)
    products_EE = torch.zeros(groups, groups, dtype=torch.float64)
    step = max(1, _CHUNK // (groups * columns))
    for start in range(0, rows, step):
        part_EOI = torch.stack([matrix[start : start + step].float() for matrix in matrices_OI])
        if factors is not None:
            part_EOI[list(projection.slots)] += factors.b[:, start : start + step] @ factors.a
        part_EN = part_EOI.flatten(1)
        products_EE += (part_EN @ part_EN.t()).double().cpu()
    norm_E = products_EE.diagonal().sqrt()
    return products_EE / (norm_E[:, None] * norm_E).clamp_min(torch.finfo(torch.float64).tiny)

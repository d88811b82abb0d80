"""The parts of a finished study put together.

Legend: G sources, L layers, E experts, V variants (mode and expert) of a layer, D documents.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .disabled_expert import DisabledExpert
from .expert_intervals import Intervals, SourceDocuments

Arrays = dict[str, NDArray[Any]]
_LOADS = ("load_counts", "load_tokens", "load_entropy_nats", "load_confidence", "pairs")


class BatchParts(NamedTuple):
    """What `ExpertImportance` gave of a batch.

    Args:
        evaluated: Of the model as it is.
        disabled: Of each layer.
    """

    evaluated: Arrays
    disabled: Sequence[Arrays]


@dataclass(frozen=True)
class ExpertResults:
    """Sums over all batches.

    Args:
        names: Of the sources.
        variants: What was disabled in each layer.
        documents: Of each source; their variants are those of layer 0, then of layer 1 and so on.
        loads: ``load_counts`` ``[G, L, E]``, ``load_tokens``, ``load_entropy_nats``, ``load_confidence`` ``[G, L]`` and
            ``pairs`` ``[G, L, E, E]``, see `ExpertImportance.evaluate`.
        output_cosines: float64 ``[L, E, E]``, mean over the sampled tokens.
        weight_cosines: float64 ``[L, E, E]``.
        flops: Floating point operations done.
        seconds: Spent on them.
    """

    names: Sequence[str]
    variants: Sequence[DisabledExpert]
    documents: Sequence[SourceDocuments]
    loads: Arrays
    output_cosines: NDArray[np.float64]
    weight_cosines: NDArray[np.float64]
    flops: int
    seconds: float

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        variants: Sequence[DisabledExpert],
        batches: Iterable[BatchParts],
        weight_cosines: NDArray[np.float64],
    ) -> "ExpertResults":
        """Add the batches up."""
        parts = list(batches)
        everything = [arrays for part in parts for arrays in (part.evaluated, *part.disabled)]
        layers = range(len(parts[0].disabled))
        cosines = [sum(part.disabled[layer]["cosines"] for part in parts) for layer in layers]
        sampled = [sum(int(part.disabled[layer]["cosine_tokens"]) for part in parts) for layer in layers]
        return cls(
            names,
            variants,
            [_documents_of(source, parts) for source in range(len(names))],
            {name: np.sum([part.evaluated[name] for part in parts], axis=0) for name in _LOADS},
            np.stack([total / tokens for total, tokens in zip(cosines, sampled, strict=True)]),
            weight_cosines,
            sum(int(arrays["flops"]) for arrays in everything),
            math.fsum(float(arrays["seconds"]) for arrays in everything),
        )

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.output_cosines)

    def intervals(self) -> Intervals:
        """Changes with bootstrap intervals."""
        return Intervals(self.documents)

    def places(self) -> list[tuple[int, DisabledExpert]]:
        """Layer and variant of each of the ``L·V`` changes, in their order."""
        return [(layer, variant) for layer in range(self.num_layers) for variant in self.variants]

    def base_figures(self) -> dict[str, dict[str, float | int]]:
        """Likelihood of each source as `mixcn validate` has it, and how many documents it is of."""
        return {
            name: {
                "nll_nats_per_token": float(part.nats.sum() / part.tokens.sum()),
                "bits_per_byte": float(part.text_nats.sum() / math.log(2) / part.bytes.sum()),
                "tokens": int(part.tokens.sum()),
                "bytes": int(part.bytes.sum()),
                "documents": len(part.bytes),
            }
            for name, part in zip(self.names, self.documents, strict=True)
        }


def _documents_of(source: int, parts: Sequence[BatchParts]) -> SourceDocuments:
    """Add up the pieces of each document, which batches may share."""
    chosen = [part.evaluated["source"] == source for part in parts]
    piece_P = np.concatenate([part.evaluated["document"][mine] for part, mine in zip(parts, chosen, strict=True)])
    _, place_P = np.unique(piece_P, return_inverse=True)
    count = int(place_P.max()) + 1

    def total(name: str) -> NDArray[Any]:
        values = np.concatenate([part.evaluated[name][mine] for part, mine in zip(parts, chosen, strict=True)])
        sums: NDArray[Any] = np.bincount(place_P, weights=values, minlength=count).astype(values.dtype)
        return sums

    def changed(name: str) -> NDArray[np.float64]:
        sums_LVD = []
        for layer in range(len(parts[0].disabled)):
            pieces = [part.disabled[layer][name][:, mine] for part, mine in zip(parts, chosen, strict=True)]
            values_VP = np.concatenate(pieces, axis=1)
            sums_LVD += [np.bincount(place_P, weights=values_P, minlength=count) for values_P in values_VP]
        return np.stack(sums_LVD)

    return SourceDocuments(
        total("nats"),
        total("text_nats"),
        total("tokens"),
        total("bytes"),
        changed_nats=changed("nats"),
        changed_text_nats=changed("text_nats"),
    )

"""The figures of each format: bits per weight, bits per byte of each source, and the difference from the unquantised.

Legend: D documents of a source.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .quantized_weights import Sizes

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SourceSums:
    """The documents of a source under one format.

    Args:
        text_nats: float64 ``[D]``, of text alone.
        bytes: int64 ``[D]``, UTF-8 bytes of text.
    """

    text_nats: NDArray[np.float64]
    bytes: NDArray[np.int64]

    @classmethod
    def of(cls, source: int, parts: Sequence[Arrays]) -> "SourceSums":
        """Add up the pieces of each document, which batches may share.

        Args:
            source: Which one.
            parts: `score_documents` of each batch.
        """
        mine = [part["source"] == source for part in parts]
        document_P = np.concatenate([part["document"][chosen] for part, chosen in zip(parts, mine, strict=True)])
        _, place_P = np.unique(document_P, return_inverse=True)

        def total(name: str) -> NDArray[Any]:
            values_P = np.concatenate([part[name][chosen] for part, chosen in zip(parts, mine, strict=True)])
            return np.bincount(place_P, weights=values_P)

        return cls(total("text_nats"), total("bytes").astype(np.int64))

    def bits_per_byte(self) -> float:
        """Of all documents together."""
        return float(self.text_nats.sum() / math.log(2) / self.bytes.sum())

    def difference(self, base: "SourceSums") -> tuple[float, float]:
        """Bits per byte less those of another format, and its standard error over documents, which are paired.

        The error is that of a ratio of sums (Cochran, Sampling Techniques, 1977, 6.3): NaN for fewer than two
        documents.
        """
        bits_D = (self.text_nats - base.text_nats) / math.log(2)
        change, documents = float(bits_D.sum() / self.bytes.sum()), len(bits_D)
        if documents < 2:
            return change, math.nan
        residual_D = bits_D - change * self.bytes
        variance = documents / (documents - 1) * float((residual_D**2).sum())
        return change, math.sqrt(variance) / float(self.bytes.sum())


@dataclass(frozen=True)
class FormatResult:
    """One line of the report.

    Args:
        name: Of the format.
        size: Bytes: of the weights in memory, computed where nothing stores them so, or of the file.
        size_of: ``memory``, ``computed`` or ``file``.
        sizes: Of the weights.
        relative_error: Of the rounded weights.
        sources: The documents of each source, by its name.
    """

    name: str
    size: int
    size_of: str
    sizes: Sizes
    relative_error: float
    sources: Mapping[str, SourceSums]

    def figures(self, base: "FormatResult") -> dict[str, Any]:
        """All figures, as JSON has them."""
        sizes = self.sizes
        found: dict[str, Any] = {
            "format": self.name,
            "bytes": self.size,
            "bytes_of": self.size_of,
            "bits_per_quantised_weight": 8 * sizes.quantised_bytes / sizes.quantised_weights,
            "bits_per_weight": 8 * sizes.bytes / sizes.weights,
            "relative_weight_error": self.relative_error,
            "sources": {},
        }
        for name, sums in self.sources.items():
            change, error = sums.difference(base.sources[name])
            found["sources"][name] = {
                "bits_per_byte": sums.bits_per_byte(),
                "difference": change,
                "standard_error": None if math.isnan(error) or self is base else error,
                "documents": len(sums.bytes),
                "bytes_of_text": int(sums.bytes.sum()),
            }
        return found

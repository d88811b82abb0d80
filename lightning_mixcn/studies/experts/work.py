"""The work of the study of experts, batch by batch and layer by layer, of which finished parts are kept."""

import math
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lightning_mixcn.data.loaders import EvaluationLoader
from lightning_mixcn.studies.parts import StudyParts

from .disabling import DisabledExpert
from .flops import StudyFlops, pairs_of_rows
from .importance import ExpertImportance
from .requests import RequestScores
from .statistics import Intervals, SourceDocuments

Arrays = dict[str, NDArray[Any]]
_LOADS = ("load_counts", "load_tokens", "load_entropy_nats", "load_confidence", "pairs", "saliency")


class BatchParts(NamedTuple):
    """What `ExpertImportance` gave of a batch.

    Args:
        evaluated: Figures of the model as it is.
        disabled: Figures of each layer; none where no expert is disabled.
    """

    evaluated: Arrays
    disabled: Sequence[Arrays]


@dataclass(frozen=True)
class ExpertResults:
    """Sums over all batches.

    Args:
        names: Names of the sources.
        variants: Experts that were disabled in each layer.
        documents: Documents of each source; their variants are those of layer 0, then of layer 1 and so on.
        loads: ``load_counts`` ``[G, L, E]``, ``load_tokens``, ``load_entropy_nats``, ``load_confidence`` ``[G, L]`` and
            ``pairs`` ``[G, L, E, E]``, ``saliency`` ``[G, L, E]``, see `ExpertImportance.evaluate`.
        output_cosines: float64 ``[L, E, E]``, mean over the sampled tokens; ``None`` where no expert is disabled.
        weight_cosines: float64 ``[L, E, E]``.
        flops: Floating point operations done.
        seconds: Spent on them.
    """

    names: Sequence[str]
    variants: Sequence[DisabledExpert]
    documents: Sequence[SourceDocuments]
    loads: Arrays
    output_cosines: NDArray[np.float64] | None
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
            np.stack([total / tokens for total, tokens in zip(cosines, sampled, strict=True)]) if cosines else None,
            weight_cosines,
            sum(int(arrays["flops"]) for arrays in everything),
            math.fsum(float(arrays["seconds"]) for arrays in everything),
        )

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.weight_cosines)

    def intervals(self) -> Intervals:
        """Return the changes with bootstrap intervals."""
        return Intervals(self.documents)

    def places(self) -> list[tuple[int, DisabledExpert]]:
        """Return layer and variant of each of the ``L·V`` changes, in their order."""
        return [(layer, variant) for layer in range(self.num_layers) for variant in self.variants]

    def saliency(self) -> NDArray[np.float64]:
        """Return the mean over each expert's tokens, ``[G, L, E]``; 0 for one without tokens."""
        mean: NDArray[np.float64] = self.loads["saliency"] / np.maximum(self.loads["load_counts"], 1)
        return mean

    def saliency_in_layer(self) -> NDArray[np.float64]:
        """Return the same over its mean in the layer: norms grow from layer to layer, ``[G, L, E]``."""
        saliency_GLE = self.saliency()
        mean_GL1 = np.maximum(saliency_GLE.mean(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
        in_layer: NDArray[np.float64] = saliency_GLE / mean_GL1
        return in_layer

    def base_figures(self) -> dict[str, dict[str, float | int]]:
        """Return likelihood of each source as `mixcn validate` has it, and how many documents it is of."""
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
        return np.reshape(sums_LVD, (-1, count))

    return SourceDocuments(
        total("nats"),
        total("text_nats"),
        total("tokens"),
        total("bytes"),
        changed_nats=changed("nats"),
        changed_text_nats=changed("text_nats"),
    )


class BatchWork(NamedTuple):
    """A batch of text or of requests.

    Args:
        part: Name of its parts.
        size: Tokens, and pairs that attention compares.
        flops: Cost of the batch.
        evaluate: Measures the model as it is.
        disable: Measures it without each expert of some layers, given what ``evaluate`` gave; a layer's number and
            arrays.
    """

    part: str
    size: tuple[int, int]
    flops: StudyFlops
    evaluate: Callable[[], Arrays]
    disable: Callable[[Arrays, Sequence[int]], Iterator[tuple[int, Arrays]]]


def text_work(importance: ExpertImportance, loader: EvaluationLoader) -> list[BatchWork]:
    """Make the batches of text."""
    return [
        BatchWork(
            f"batch{number}",
            (batch["input_ids"].numel(), sum(pairs_of_rows(batch["position_ids"]))),
            importance.flops,
            partial(importance.evaluate, batch),
            partial(importance.disable, batch),
        )
        for number, batch in enumerate(loader)
    ]


def request_work(scores: RequestScores) -> list[BatchWork]:
    """Make the batches of requests."""
    return [
        BatchWork(
            f"requests{number}",
            scores.size(number),
            scores.flops,
            partial(scores.evaluate, number),
            partial(scores.disable, number),
        )
        for number in range(len(scores))
    ]


def planned_flops(work: Sequence[BatchWork]) -> dict[str, int]:
    """Return floating point operations.

    Returns:
        ``planned``; ``forward_pass`` of the model as it is over everything, and ``plain`` of one such pass for each
        disabled expert.
    """
    return {
        "planned": sum(batch.flops.planned(*batch.size) for batch in work),
        "forward_pass": sum(batch.flops.base(*batch.size) for batch in work),
        "plain": sum(batch.flops.plain(*batch.size) for batch in work),
    }


def compute(work: Sequence[BatchWork], num_layers: int, parts: StudyParts) -> None:
    """Do what is not there yet.

    Args:
        work: Batches.
        num_layers: Layers whose experts are disabled, all or none.
        parts: What was done before, and is done now.
    """
    total = planned_flops(work)["planned"]
    with tqdm(total=total, unit="FLOP", unit_scale=True, desc="studying experts") as progress:
        for batch in work:
            if batch.part not in parts:
                parts.save(batch.part, batch.evaluate())
            progress.update(batch.flops.base(*batch.size))
            left = [layer for layer in range(num_layers) if _layer_part(batch, layer) not in parts]
            there = set(range(num_layers)) - set(left)
            progress.update(sum(batch.flops.layer(layer, *batch.size) for layer in there))
            for layer, arrays in batch.disable(parts.load(batch.part), left):
                parts.save(_layer_part(batch, layer), arrays)
                progress.update(batch.flops.layer(layer, *batch.size))


def finished(work: Sequence[BatchWork], num_layers: int, parts: StudyParts) -> list[BatchParts]:
    """Return what was computed of each batch."""
    return [
        BatchParts(parts.load(batch.part), [parts.load(_layer_part(batch, layer)) for layer in range(num_layers)])
        for batch in work
    ]


def spent(batches: Sequence[BatchParts]) -> dict[str, Any]:
    """Return the floating point operations that were ``done``, and ``seconds`` spent on them."""
    everything = [arrays for batch in batches for arrays in (batch.evaluated, *batch.disabled)]
    return {
        "done": sum(int(arrays["flops"]) for arrays in everything),
        "seconds": math.fsum(float(arrays["seconds"]) for arrays in everything),
    }


def _layer_part(batch: BatchWork, layer: int) -> str:
    return f"{batch.part}_layer{layer}"

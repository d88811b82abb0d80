"""The work of the study of experts, batch by batch and layer by layer, of which finished parts are kept."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from numpy.typing import NDArray
from tqdm.auto import tqdm

from lightning_mixcn.data.evaluation_loader import EvaluationLoader

from .expert_flops import StudyFlops, pairs_of_rows
from .expert_importance import ExpertImportance
from .expert_results import BatchParts
from .request_scores import RequestScores
from .study_parts import StudyParts



class BatchWork(NamedTuple):
    """A batch of text or of requests.

    Args:
        part: Name of its parts.
        size: Tokens, and pairs that attention compares.
        flops: What it costs.
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
    """The batches of text."""
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
    """The batches of requests."""
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
    """Floating point operations: ``planned`` and ``plain``, of evaluating the model once for each expert."""
    return {
        "planned": sum(batch.flops.planned(*batch.size) for batch in work),
        "plain": sum(batch.flops.plain(*batch.size) for batch in work),
    }


def compute(work: Sequence[BatchWork], num_layers: int, parts: StudyParts) -> None:
    """Do what is not there yet."""
    total = planned_flops(work)["planned"]
    with tqdm(total=total, unit="FLOP", unit_scale=True, desc="disabling experts") as progress:
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
    """What was computed of each batch."""
    return [
        BatchParts(parts.load(batch.part), [parts.load(_layer_part(batch, layer)) for layer in range(num_layers)])
        for batch in work
    ]


def spent(batches: Sequence[BatchParts]) -> dict[str, Any]:
    """Floating point operations that were ``done``, and ``seconds`` spent on them."""
    everything = [arrays for batch in batches for arrays in (batch.evaluated, *batch.disabled)]
    return {
        "done": sum(int(arrays["flops"]) for arrays in everything),
        "seconds": math.fsum(float(arrays["seconds"]) for arrays in everything),
    }


def _layer_part(batch: BatchWork, layer: int) -> str:
    return f"{batch.part}_layer{layer}"

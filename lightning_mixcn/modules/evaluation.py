"""One pass over evaluation data: the likelihood of each source, under its name."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_mixcn.errors import NonFiniteError
from lightning_mixcn.metrics import Likelihood, SourceLikelihood

from .checks import source_names


class SourceEvaluation:
    """Sums of one pass over the evaluation data.

    Args:
        stage: ``val`` or ``test``; the first part of the logged names.
        trainer: Lightning's, whose data module names the sources.
        device: Where the batches are.
    """

    def __init__(self, stage: str, trainer: Any, device: torch.device) -> None:
        """Make empty sums."""
        self.stage = stage
        self._names = source_names(trainer, stage)
        self._likelihood = SourceLikelihood(len(self._names)).to(device)

    def update(self, nll: Tensor, batch: dict[str, Tensor]) -> None:
        """Add a batch; ``nll`` is float32 ``[B, S]`` in nats, the rest is the evaluation batch of the data module."""
        self._likelihood.update(nll, batch["labels"], batch["source_ids"], batch["label_bytes"], batch["text_mask"])

    def finish(self) -> dict[str, Likelihood]:
        """Likelihood of every source that had tokens, over all ranks; call it on each of them.

        Raises:
            FloatingPointError: a source's likelihood is not finite.
        """
        results = {self._names[source]: result for source, result in self._likelihood.compute().items()}
        for name, result in results.items():
            if not math.isfinite(result["nll_nats_per_token"]):
                raise NonFiniteError(
                    f"The likelihood of the source {name!r} is {result['nll_nats_per_token']} nats a token: the "
                    "model's output is not finite. Check the checkpoint or the adapter that was loaded"
                )
        return results

    def tags(self, results: dict[str, Likelihood]) -> dict[str, float]:
        """What is logged: ``<stage>/<source>/nll_nats_per_token`` and ``<stage>/<source>/bits_per_byte``."""
        tags: dict[str, float] = {}
        for name, result in results.items():
            tags[f"{self.stage}/{name}/nll_nats_per_token"] = result["nll_nats_per_token"]
            if result["bytes"]:
                tags[f"{self.stage}/{name}/bits_per_byte"] = result["bits_per_byte"]
        return tags

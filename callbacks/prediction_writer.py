"""The likelihood of every document as a file."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_mixcn.modules.run_checks import source_names

from .finished_output import write_text
from .host import causal_lm

# source, document -> nats, text nats, tokens, bytes
_Sums = dict[tuple[int, int], tuple[float, float, int, int]]


class PredictionWriter(Callback):
    """Writes one JSON line a document: nats, tokens, bytes and bits per byte, in the order of the evaluation data.

    ``nats`` is over all labels, the end of the document included, ``text_nats`` over its text; ``bits_per_byte`` is
    ``text_nats`` / ln 2 / ``bytes``. Pieces of a document in several rows, and on several ranks, are put together.

    Args:
        filename: Name of the file inside ``trainer.default_root_dir``.
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        self.filename = filename
        self._sums: _Sums = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module."""
        causal_lm(self, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        self._sums = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the pieces in a batch."""
        columns = (column.tolist() for column in outputs)
        for source, document, *values in zip(*columns, strict=True):
            _add(self._sums, (source, document), tuple(values))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the ranks' pieces together and write the file."""
        merged: _Sums = {}
        for sums in _gather(self._sums):
            for key, values in sums.items():
                _add(merged, key, values)
        if trainer.is_global_zero:
            names = source_names(trainer, "predict")
            path = Path(trainer.default_root_dir, self.filename)
            write_text(path, "".join(_line(names[key[0]], key[1], merged[key]) for key in sorted(merged)))
            rank_zero_info(f"predictions: {path}")


def _add(sums: _Sums, key: tuple[int, int], values: Any) -> None:
    before = sums.get(key, (0.0, 0.0, 0, 0))
    nats, text_nats, tokens, size = (old + new for old, new in zip(before, values, strict=True))
    sums[key] = (nats, text_nats, tokens, size)


def _gather(sums: _Sums) -> list[_Sums]:
    """Every rank's sums, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [sums]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, sums)
    return gathered


def _line(source: str, document: int, values: tuple[float, float, int, int]) -> str:
    nats, text_nats, tokens, size = values
    record = {
        "source": source,
        "index": document,
        "nats": nats,
        "text_nats": text_nats,
        "tokens": tokens,
        "bytes": size,
        "bits_per_byte": text_nats / math.log(2) / size if size else None,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"

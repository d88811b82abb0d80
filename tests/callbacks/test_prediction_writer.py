"""The documents' file against the module's own predictions."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.callbacks import PredictionWriter
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Any]


def test_one_line_a_document(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    """Document i of both batches is one document, as if its second row had not fitted into the first batch."""
    batches = [random_batch([20, 24, 9], seed=0, sources=2), random_batch([5, 12], seed=1, sources=2)]
    predictions = trainer(callbacks=[PredictionWriter()]).predict(module, FixedBatches(batches, ["zh", "en"]))
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["source"], line["index"]) for line in lines] == [("zh", 0), ("zh", 2), ("en", 1)]
    assert [line["tokens"] for line in lines] == [19 + 4, 8, 23 + 11]
    assert [line["bytes"] for line in lines] == [18 + 3, 7, 22 + 10]
    assert lines[0]["nats"] == float(predictions[0].nats[0] + predictions[1].nats[0])
    for line in lines:
        assert 0 < line["text_nats"] < line["nats"]
        assert line["bits_per_byte"] == pytest.approx(line["text_nats"] / math.log(2) / line["bytes"])

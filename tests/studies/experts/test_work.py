"""Parts of batches put together: a document that batches share is one document."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.studies.experts.importance import ExpertImportance
from lightning_mixcn.studies.experts.work import BatchParts, ExpertResults
from tests.studies.experts.stock_experts import evaluation_batches


def results(base: Path, texts: list[Path], length: int, rows: int) -> ExpertResults:
    model: Any = load_mixtral(base, quantization="none", dtype="float32").eval()
    importance, parts = ExpertImportance(model, ["zero"], 2, rows), []
    for batch in evaluation_batches(base, texts, length, rows, max_rows=None):
        evaluated = importance.evaluate(batch)
        parts.append(BatchParts(evaluated, [part for _, part in importance.disable(batch, evaluated, range(3))]))
    return ExpertResults.of(["zh", "en"], importance.variants, parts, np.zeros((3, 4, 4)))


def test_batches_of_any_size_give_the_same(routed_base: Path, texts: list[Path]) -> None:
    """Documents of up to 122 tokens in rows of 32: most lie in several rows, and in several batches."""
    small, large = results(routed_base, texts, 32, 1), results(routed_base, texts, 32, 5)
    assert len(small.documents[0].bytes) == 12
    assert len(small.documents[1].bytes) == 40
    for mine, other in zip(small.documents, large.documents, strict=True):
        for part, same in zip(mine, other, strict=True):
            np.testing.assert_allclose(part, same, atol=1e-4)
    for name in ("load_counts", "pairs"):
        assert np.array_equal(small.loads[name], large.loads[name])
    assert small.places()[5] == (1, small.variants[1])
    assert small.flops > 0


def test_base_figures_are_sums_divided_once(routed_base: Path, texts: list[Path]) -> None:
    found = results(routed_base, texts, 64, 2)
    (zh, en), part = found.base_figures().values(), found.documents[1]
    assert en["bits_per_byte"] == pytest.approx(sum(part.text_nats) / math.log(2) / sum(part.bytes))
    assert en["nll_nats_per_token"] == pytest.approx(sum(part.nats) / sum(part.tokens))
    lines = texts[0].read_text(encoding="utf-8").splitlines()
    assert zh["bytes"] == sum(len(json.loads(line)["text"].encode()) for line in lines)

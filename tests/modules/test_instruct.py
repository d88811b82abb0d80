"""Weighting by conversation against means taken one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_mixcn.modules import InstructModule
from lightning_mixcn.modules.instruct import mean_by_document
from lightning_mixcn.testing import FixedBatches, random_batch


def test_sum_of_means_by_document() -> None:
    generator = torch.Generator().manual_seed(0)
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [0, 1, 1, 2, 2, 2, 2], [-1] * 7])
    labels = torch.randint(0, 9, document_ids.shape, generator=generator)
    labels[document_ids < 0] = -100
    labels[0, 0] = labels[1, :2] = labels[1, 4] = -100  # document 0 of row 1 has no label
    nll = torch.rand(labels.shape, generator=generator) * (labels >= 0)
    nll.requires_grad_()
    total, count = mean_by_document(nll, labels, document_ids)
    means = [
        nll[row][(document_ids[row] == document) & (labels[row] >= 0)].mean()
        for row in range(3)
        for document in range(3)
        if ((document_ids[row] == document) & (labels[row] >= 0)).any()
    ]
    assert int(count) == len(means) == 4
    torch.testing.assert_close(total, torch.stack(means).sum())
    total.backward()
    assert nll.grad is not None
    assert nll.grad[labels < 0].abs().sum() == 0


def test_the_weighting_is_what_is_minimised(tiny_base: Path, trainer: Any) -> None:
    """A step's logged loss is the mean over tokens, or over conversations, of the whole step."""
    losses: dict[str, float] = {}
    for weighting in ("token", "conversation"):
        module = InstructModule(
            str(tiny_base), quantization="none", dtype="float32", train_embeddings=True, router_aux_loss_coef=0.0,
            loss_weighting=weighting,
        )  # fmt: skip
        run: Trainer = trainer(max_steps=1, accumulate_grad_batches=2)
        micro_batches = [random_batch([4, 20]), random_batch([9], seed=1)]
        run.fit(module, FixedBatches(micro_batches))
        losses[weighting] = float(run.callback_metrics["train/loss"])
    before = InstructModule(str(tiny_base), quantization="none", dtype="float32", train_embeddings=True)
    before.configure_model()
    with torch.no_grad():
        nll = [before(batch).nll[batch["labels"] >= 0] for batch in micro_batches]
    rows = [*nll[0].split([3, 19]), nll[1]]
    assert losses["token"] == pytest.approx(float(torch.cat(rows).mean()), rel=1e-5)
    assert losses["conversation"] == pytest.approx(float(torch.stack([row.mean() for row in rows]).mean()), rel=1e-5)


def test_another_weighting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`loss_weighting='sample'`: expected one of token, conversation"):
        InstructModule("base", loss_weighting="sample")  # type: ignore[arg-type]  # what a person may type

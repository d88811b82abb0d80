"""Random batches keep the promises of a data module's."""

import torch

from lightning_mixcn.testing import FixedBatches, random_batch


def test_rows_of_one_document_and_padding() -> None:
    batch = random_batch([5, 8], sequence_length=8, sources=2)
    assert batch["input_ids"][:, 0].tolist() == [1, 1]
    assert batch["input_ids"][0, 4:].tolist() == [2, 2, 2, 2]
    assert batch["labels"][0].tolist() == [-100, *batch["input_ids"][0, 1:5].tolist(), -100, -100, -100]
    assert batch["document_ids"].tolist() == [[0] * 5 + [-1] * 3, [0] * 8]
    assert batch["source_ids"].tolist() == [[0] * 5 + [-1] * 3, [1] * 8]
    assert batch["label_bytes"].sum(1).tolist() == batch["text_mask"].sum(1).tolist() == [3, 6]


def test_the_seed_decides() -> None:
    assert torch.equal(random_batch([8])["input_ids"], random_batch([8])["input_ids"])
    assert not torch.equal(random_batch([8])["input_ids"], random_batch([8], seed=1)["input_ids"])


def test_loaders_give_the_batches_as_they_are() -> None:
    batch = random_batch([8])
    data = FixedBatches([batch], ["zh"])
    for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        (given,) = loader
        assert torch.equal(given["input_ids"], batch["input_ids"])
    assert data.source_names("val") == ["zh"]

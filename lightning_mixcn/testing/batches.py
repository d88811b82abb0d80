"""Batches like a data module's, made without text."""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

Batch = dict[str, Tensor]


def random_batch(lengths: Sequence[int], sequence_length: int = 24, *, seed: int = 0, sources: int = 1) -> Batch:
    """Return a batch with one document a row, and padding after it.

    Args:
        lengths: Tokens of each row's document, at most ``sequence_length``; row i is of source i modulo ``sources``.
        sequence_length: Width of the batch.
        seed: Seed of the random tokens; they are bytes of `byte_tokenizer`, BOS first and EOS last.
        sources: Number of sources.

    Returns:
        An evaluation batch, which serves for training, too; every token but BOS is labelled and is one byte.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), sequence_length)
    position_BS = torch.arange(sequence_length).expand(shape)
    length_B1 = torch.tensor(lengths)[:, None]
    inside_BS = position_BS < length_B1
    ids_BS = torch.randint(3, 259, shape, generator=generator)
    ids_BS[:, 0] = 1
    ids_BS = torch.where(position_BS == length_B1 - 1, 2, ids_BS)
    text_BS = inside_BS & (position_BS > 0) & (position_BS < length_B1 - 1)
    row_B1 = torch.arange(len(lengths))[:, None]
    return {
        "input_ids": torch.where(inside_BS, ids_BS, 2),
        "labels": torch.where(inside_BS & (position_BS > 0), ids_BS, -100),
        "document_ids": torch.where(inside_BS, 0, -1).int(),
        "position_ids": position_BS.clone(),
        "source_ids": torch.where(inside_BS, row_B1 % sources, -1).short(),
        "document_index": torch.where(inside_BS, row_B1, -1),
        "label_bytes": text_BS.int(),
        "text_mask": text_BS,
    }


class FixedBatches(LightningDataModule):
    """A data module of given batches, the same in training and evaluation.

    Args:
        batches: In their order; training stops after the last one unless ``trainer.max_epochs`` allows more.
        sources: Names of the sources.
    """

    def __init__(self, batches: Sequence[Batch], sources: Sequence[str] = ("zh",)) -> None:
        """Keep the batches."""
        super().__init__()
        self.batches, self.sources = list(batches), list(sources)

    def source_names(self, stage: str) -> list[str]:
        """Return names of the sources, whatever the stage."""
        return self.sources

    def _loader(self) -> DataLoader[Batch]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset, too

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader

"""LightningDataModules: text to batches, with exact resume."""

from lightning_mixcn.data.instruct import InstructDataModule
from lightning_mixcn.data.pretrain import PretrainDataModule
from lightning_mixcn.data.streaming import StreamDataModule

__all__ = ["InstructDataModule", "PretrainDataModule", "StreamDataModule"]

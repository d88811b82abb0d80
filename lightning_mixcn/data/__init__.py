"""LightningDataModules: text to batches, with exact resume."""

from lightning_mixcn.data.instruct import InstructDataModule
from lightning_mixcn.data.pretrain import PretrainDataModule

__all__ = ["InstructDataModule", "PretrainDataModule"]

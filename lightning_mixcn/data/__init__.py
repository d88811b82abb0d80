"""LightningDataModules: text to batches, with exact resume."""

from .instruct import InstructDataModule
from .module import StreamDataModule
from .pretrain import PretrainDataModule

__all__ = ["InstructDataModule", "PretrainDataModule", "StreamDataModule"]

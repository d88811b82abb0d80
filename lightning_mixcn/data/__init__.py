"""LightningDataModules: text to batches, with exact resume."""

from .instruct import InstructDataModule
from .module import StreamDataModule
from .preference import PreferenceDataModule
from .pretrain import PretrainDataModule

__all__ = ["InstructDataModule", "PreferenceDataModule", "PretrainDataModule", "StreamDataModule"]

"""Adapt Mixtral-style mixture-of-experts models to another language, in 4 bits, on few GPUs.

The names below are imported when they are first used: ``mixcn --help`` must not wait for torch.
"""

from typing import TYPE_CHECKING

from .lazy import lazy_names
from .library_lines import AT_IMPORT, leave_out

leave_out(AT_IMPORT)  # before anything imports bitsandbytes, as peft does

if TYPE_CHECKING:
    from lightning_mixcn.callbacks.defaults import trainer_defaults
    from lightning_mixcn.data import InstructDataModule, PreferenceDataModule, PretrainDataModule
    from lightning_mixcn.model import build_mixtral, build_moe, load_mixtral, load_moe
    from lightning_mixcn.modules import CausalLMModule, InstructModule, PreferenceModule, PretrainModule

__version__ = "0.1.0"

__all__ = [
    "CausalLMModule",
    "InstructDataModule",
    "InstructModule",
    "PreferenceDataModule",
    "PreferenceModule",
    "PretrainDataModule",
    "PretrainModule",
    "__version__",
    "build_mixtral",
    "build_moe",
    "load_mixtral",
    "load_moe",
    "trainer_defaults",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".callbacks.defaults": ("trainer_defaults",),
        ".data": ("InstructDataModule", "PreferenceDataModule", "PretrainDataModule"),
        ".model": ("build_mixtral", "build_moe", "load_mixtral", "load_moe"),
        ".modules": ("CausalLMModule", "InstructModule", "PreferenceModule", "PretrainModule"),
    },
)

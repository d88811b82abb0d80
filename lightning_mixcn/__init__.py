"""Adapt Mixtral-style mixture-of-experts models to another language, in 4 bits, on few GPUs.

The names below are imported when they are first used: ``mixcn --help`` must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_mixcn.data import InstructDataModule, PretrainDataModule
    from lightning_mixcn.model import build_mixtral, load_mixtral
    from lightning_mixcn.modules import CausalLMModule, InstructModule, PretrainModule

__version__ = "0.1.0"

__all__ = [
    "CausalLMModule",
    "InstructDataModule",
    "InstructModule",
    "PretrainDataModule",
    "PretrainModule",
    "__version__",
    "build_mixtral",
    "load_mixtral",
]

_HOME = {
    "CausalLMModule": "lightning_mixcn.modules",
    "InstructDataModule": "lightning_mixcn.data",
    "InstructModule": "lightning_mixcn.modules",
    "PretrainDataModule": "lightning_mixcn.data",
    "PretrainModule": "lightning_mixcn.modules",
    "build_mixtral": "lightning_mixcn.model",
    "load_mixtral": "lightning_mixcn.model",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562). Raises: AttributeError for any other name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names for completion, whether imported yet or not."""
    return sorted({*globals(), *__all__})

"""How a command loads a model. Imports no torch until a device is asked for: it is part of the help of commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_mixcn.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .find import ModelSource

_QUANTIZATIONS, _DTYPES = ("nf4", "none"), ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class ModelOptions:
    """Storage, compute type and device of a model.

    Args:
        quantization: Storage of attention and experts: ``nf4``, 0.52 bytes a weight, or ``none``, those of `dtype`.
        dtype: Compute type, and that of all other weights: ``bfloat16`` or ``float16``, 2 bytes a weight, or
            ``float32``, 4 bytes.
        device: ``cpu``, ``cuda``, ``cuda:1`` …; null is the GPU if there is one. Under torchrun, ``cuda`` is the GPU of
            each process's number.

    Raises:
        ValueError: one of them is not known.
    """

    quantization: str = "nf4"
    dtype: str = "bfloat16"
    device: str | None = None

    def __post_init__(self) -> None:
        """Check the names."""
        for name, known in (("quantization", _QUANTIZATIONS), ("dtype", _DTYPES)):
            if getattr(self, name) not in known:
                raise UserError(f"`{name}={getattr(self, name)!r}` is not known. Expected one of {', '.join(known)}")

    def torch_device(self) -> torch.device:
        """Return the device. Raises: ValueError."""
        return chosen_device(self.device)

    def load(self, found: ModelSource, **options: Any) -> nn.Module:
        """Load a model.

        Args:
            found: Result of `find_model`.
            options: Further arguments of `load_found`; a ``device`` among them replaces the one of here.
        """
        from .find import load_found

        given: dict[str, Any] = {"quantization": self.quantization, "dtype": self.dtype, "device": self.torch_device()}
        return load_found(found, **(given | options))


def chosen_device(device: str | None) -> torch.device:
    """Return torch's device of a name, by default the GPU if there is one. Raises: ValueError."""
    import torch

    from .checkpoints.reading import torch_device

    return torch_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

"""Check the module that a callback of this package runs in."""

from lightning.pytorch import Callback, LightningModule

from lightning_mixcn.errors import UserError
from lightning_mixcn.modules import CausalLMModule


def causal_lm(callback: Callback, module: LightningModule) -> CausalLMModule:
    """Return the module, if it is one that the callback can work with.

    Args:
        callback: Callback that asks.
        module: The LightningModule that is trained or evaluated.

    Raises:
        ValueError: The module is none of this package's, nor a subclass of one.
    """
    if not isinstance(module, CausalLMModule):
        raise UserError(
            f"{type(callback).__name__} works with a CausalLMModule, but `model` is {type(module).__name__}. "
            "Subclass CausalLMModule, or leave the callback out"
        )
    return module

"""What a model consists of before training: 4-bit weights by their elements, not by their bytes."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info

from lightning_mixcn.files.written import in_units
from lightning_mixcn.model import bytes_in_memory, count_parameters
from lightning_mixcn.modules import CausalLMModule


class ParameterSummary(ModelSummary):
    """Says in two lines what a CausalLMModule's model holds when `fit` starts; of another module, Lightning's summary.

    Lightning's counts the bytes in which 4 bits are packed as weights, takes them for four bytes each, and knows no
    operations of a mixture. Sizes are those of the whole model, of all ranks together.
    """

    def __init__(self) -> None:
        super().__init__()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it."""
        if not isinstance(pl_module, CausalLMModule):
            super().on_fit_start(trainer, pl_module)
            return
        count, held = count_parameters(pl_module), bytes_in_memory(pl_module)
        parts = {"total": "in all", "trainable": "trained", "quantised": "in 4 bits"}
        numbers = ", ".join(f"{count[name] / 1e6:,.1f} M {what}" for name, what in parts.items() if count[name])
        names = {"quantised": "in 4 bits", "dense": "other frozen weights", "trainable": "trained"}
        sizes = ", ".join(f"{in_units(held[name])} {what}" for name, what in names.items() if held[name])
        rank_zero_info(f"parameters  {numbers}\nin memory   {sizes}")

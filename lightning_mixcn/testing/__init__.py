"""What tests need, the project's own and those of subclassers."""

from .batches import FixedBatches, random_batch
from .distributed import run_distributed
from .tiny import byte_tokenizer, save_tiny_mixtral, save_tiny_model, tiny_config, tiny_mixtral_config

__all__ = [
    "FixedBatches",
    "byte_tokenizer",
    "random_batch",
    "run_distributed",
    "save_tiny_mixtral",
    "save_tiny_model",
    "tiny_config",
    "tiny_mixtral_config",
]

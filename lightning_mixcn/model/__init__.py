"""Mixtral in 4 bits, experts included, with LoRA on attention, router and every expert."""

import logging
from typing import TYPE_CHECKING

from lightning_mixcn.lazy import lazy_names

# bitsandbytes warns at import that an optional inference kernel of a hub is missing; nothing here would use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from .checkpoints.identity import base_identity
    from .find import ModelSource, find_model, load_found
    from .loading import build_mixtral, load_mixtral
    from .lora.attach import MixtralPeftModel
    from .memory.checkpointing import set_activation_checkpointing
    from .memory.counts import count_parameters
    from .mixtral import MixtralForCausalLM, bytes_in_memory, planned_quantised_bytes
    from .sharding import (
        is_sharded,
        local_bytes,
        set_gradient_sync,
        shard_model,
    )

__all__ = [
    "MixtralForCausalLM",
    "MixtralPeftModel",
    "ModelSource",
    "base_identity",
    "build_mixtral",
    "bytes_in_memory",
    "count_parameters",
    "find_model",
    "is_sharded",
    "load_found",
    "load_mixtral",
    "local_bytes",
    "planned_quantised_bytes",
    "set_activation_checkpointing",
    "set_gradient_sync",
    "shard_model",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".checkpoints.identity": ("base_identity",),
        ".find": ("ModelSource", "find_model", "load_found"),
        ".loading": ("build_mixtral", "load_mixtral"),
        ".lora.attach": ("MixtralPeftModel",),
        ".memory.checkpointing": ("set_activation_checkpointing",),
        ".memory.counts": ("count_parameters",),
        ".mixtral": ("MixtralForCausalLM", "bytes_in_memory", "planned_quantised_bytes"),
        ".sharding": ("is_sharded", "local_bytes", "set_gradient_sync", "shard_model"),
    },
)

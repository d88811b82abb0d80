"""Mixtures in 4 bits, experts included, with LoRA on attention, router and every expert."""

from typing import TYPE_CHECKING

from lightning_mixcn.lazy import lazy_names

if TYPE_CHECKING:
    from .causal_lm import MoeForCausalLM, bytes_in_memory, planned_quantised_bytes
    from .checkpoints.identity import base_identity
    from .find import ModelSource, find_model, load_found
    from .loading import build_mixtral, build_moe, load_mixtral, load_moe
    from .lora.attach import MoePeftModel
    from .memory.checkpointing import set_activation_checkpointing
    from .memory.counts import count_parameters
    from .sharding import (
        is_sharded,
        local_bytes,
        set_gradient_sync,
        shard_model,
    )

__all__ = [
    "ModelSource",
    "MoeForCausalLM",
    "MoePeftModel",
    "base_identity",
    "build_mixtral",
    "build_moe",
    "bytes_in_memory",
    "count_parameters",
    "find_model",
    "is_sharded",
    "load_found",
    "load_mixtral",
    "load_moe",
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
        ".loading": ("build_mixtral", "build_moe", "load_mixtral", "load_moe"),
        ".lora.attach": ("MoePeftModel",),
        ".memory.checkpointing": ("set_activation_checkpointing",),
        ".memory.counts": ("count_parameters",),
        ".causal_lm": ("MoeForCausalLM", "bytes_in_memory", "planned_quantised_bytes"),
        ".sharding": ("is_sharded", "local_bytes", "set_gradient_sync", "shard_model"),
    },
)

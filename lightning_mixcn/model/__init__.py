"""Mixtral in 4 bits, experts included, with LoRA on attention, router and every expert."""

import logging

# bitsandbytes warns at import that an optional inference kernel of a hub is missing; nothing here would use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# ruff: noqa: E402  # the imports come after the line that keeps them quiet
from .activation_checkpointing import set_activation_checkpointing
from .adapters import MixtralPeftModel
from .identity import base_identity
from .inventory import bytes_in_memory, count_parameters, planned_quantised_bytes
from .loading import build_mixtral, load_mixtral
from .mixtral import MixtralForCausalLM
from .model_source import ModelSource, find_model, load_found
from .sharding import is_sharded, local_bytes, set_gradient_sync, shard_model

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

"""LightningModules: batch → loss → log. The classes to subclass."""

from .causal_lm import CausalLMModule
from .pretrain import PretrainModule
from .schedule import WarmupCosine

__all__ = ["CausalLMModule", "PretrainModule", "WarmupCosine"]

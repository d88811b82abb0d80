"""LightningModules: batch → loss → log. The classes to subclass."""

from .causal_lm import CausalLMModule
from .instruct import InstructModule
from .preference import PreferenceModule
from .pretrain import PretrainModule
from .schedule import WarmupCosine, WarmupStableDecay
from .strategies import FSDP2Strategy

__all__ = [
    "CausalLMModule",
    "FSDP2Strategy",
    "InstructModule",
    "PreferenceModule",
    "PretrainModule",
    "WarmupCosine",
    "WarmupStableDecay",
]

"""What one family of mixtures has of its own. Whatever is not here is the same in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # its import takes seconds, for which `mixcn upcycle --help` does not wait
    from torch import nn


@dataclass(frozen=True, eq=False)  # one record a family: compared, and hashed, as itself
class Architecture:
    """One family: a softmax top-k router over SwiGLU experts in every layer, behind attention with RoPE.

    Names in memory are the same for all: ``self_attn.q_proj`` …, ``mlp.gate.linear`` for the router, and
    ``mlp.experts.gate_proj``, ``up_proj``, ``down_proj`` for the stacks of all experts' matrices.

    Args:
        model_type: transformers' name.
        title: Name for people.
        config: transformers' configuration.
        causal_lm: transformers' causal LM.
        attention: transformers' attention.
        router: transformers' router, whose class its decoder records router logits by.
        rotary: transformers' RoPE.
        auxiliary_loss: transformers' load-balancing loss, ``(router logits, E, K, mask)``.
        expert_width: Name of the configuration's width of an expert.
        expert_count: Published files' name of the number of experts, which transformers 4 and llama.cpp read.
        block: Name on disk of the mixture in a layer, where each expert's matrices are apart; fused it is ``mlp``.
        projections: Name in memory of an expert's matrix → its name on disk where each is apart.
        normalises: Tells whether the weights of the chosen experts are divided by their sum.
        attention_norms: Names of attention's own norms → their widths.
        accepted: Key of ``config.json`` → the values that are supported; absent counts as ``None``.
        dense: transformers' types of the dense models whose attention it has, so that it continues them.
        upcycled: Settings of the configuration of a mixture that was made of a dense model.
        gguf_pairs: Rows of q and k are in pairs in a GGUF, since llama.cpp rotates neighbours in this family.
        llama_cpp: Settings that llama.cpp has built in for the family, whatever the model's are.
    """

    model_type: str
    title: str
    config: Any
    causal_lm: Any
    attention: Any
    router: type[nn.Module]
    rotary: Any
    auxiliary_loss: Callable[..., Any]
    expert_width: str
    expert_count: str
    block: str
    projections: Mapping[str, str]
    normalises: Callable[[Any], bool]
    attention_norms: Callable[[Any], Mapping[str, int]]
    accepted: Mapping[str, tuple[Any, ...]]
    dense: tuple[str, ...]
    upcycled: Mapping[str, Any]
    gguf_pairs: bool
    llama_cpp: Mapping[str, Any]

    @property
    def short_names(self) -> tuple[str, ...]:
        """Last parts of the names on disk of all matrices that LoRA can adapt."""
        return ("q_proj", "k_proj", "v_proj", "o_proj", "gate", *self.projections.values())


def head_size(config: Any) -> int:
    """Return the width of one attention head; some families' configurations have no ``head_dim``."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

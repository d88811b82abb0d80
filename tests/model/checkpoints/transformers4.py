"""A stand-in for transformers 4's Mixtral, which is not installed: its matrices, under its names, one an expert."""

from torch import nn
from transformers import MixtralConfig


class NamesOfTransformers4(nn.Module):
    """Linear maps of the right sizes that stock PEFT matches, wraps and fills; there is nothing to compute with.

    Args:
        config: Sizes.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        head = config.head_dim or hidden // config.num_attention_heads
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        sizes = {
            "self_attn.q_proj": (hidden, queries), "self_attn.k_proj": (hidden, keys),
            "self_attn.v_proj": (hidden, keys), "self_attn.o_proj": (queries, hidden),
            "block_sparse_moe.gate": (hidden, config.num_local_experts),
        }  # fmt: skip
        for expert in range(config.num_local_experts):
            for leaf, size in {"w1": (hidden, inner), "w2": (inner, hidden), "w3": (hidden, inner)}.items():
                sizes[f"block_sparse_moe.experts.{expert}.{leaf}"] = size
        for layer in range(config.num_hidden_layers):
            for name, (columns, rows) in sizes.items():
                self._put(f"model.layers.{layer}.{name}", nn.Linear(columns, rows, bias=False))

    def _put(self, name: str, linear: nn.Linear) -> None:
        parent: nn.Module = self
        *parts, leaf = name.split(".")
        for part in parts:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(leaf, linear)

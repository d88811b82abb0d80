"""Find what a module needs in a checkpoint: the two namings of Mixtral's weights.

transformers 4 and the published checkpoints store one matrix an expert (``block_sparse_moe.experts.N.w1.weight``);
transformers 5 can store them fused (``mlp.experts.gate_up_proj [E, 2I, H]``, gate rows first).
"""

import math
from typing import NamedTuple

from transformers import MixtralConfig

from lightning_mixcn.model.nf4.codec import BLOCKS_PER_SUPERBLOCK, SUPERBLOCK, superblocks

from .folder import Checkpoint, TensorSlice

_ROUTER = "mlp.gate.linear"
# PEFT's and our name of an expert projection → the paper's.
EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def disk_names(module_name: str, groups: int) -> list[str]:
    """Return the names on disk of the groups of the module that is called ``module_name`` in memory."""
    if module_name.endswith(".mlp.gate.linear"):
        return [module_name.replace(".mlp.gate.linear", ".block_sparse_moe.gate")]
    layer, found, leaf = module_name.partition(".mlp.experts.")
    if not found:
        return [module_name]
    return [f"{layer}.block_sparse_moe.experts.{expert}.{EXPERT_NAMES[leaf]}" for expert in range(groups)]


class StoredWeight(NamedTuple):
    """A weight of the model and its parts in a checkpoint.

    Args:
        name: Name of its module in the model.
        shape: Shape of the weight, ``[groups, out, in]`` of a `FrozenLinear`.
        segments: Parts in the checkpoint, in order.
        attribute: Parameter to fill as it is stored; ``None`` for a `FrozenLinear`, whose storage takes the weight in
            its own way.
    """

    name: str
    shape: tuple[int, ...]
    segments: list[TensorSlice]
    attribute: str | None

    @property
    def is_rounded(self) -> bool:
        """NF4 rounds it: a matrix of attention, or a stack of experts'."""
        return self.attribute is None and rounds(self.name, self.shape)


def module_shapes(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Map each module of a Mixtral that has a weight to its shape, in the model's order.

    A `FrozenLinear` has ``[groups, out, in]``. A tied head has no weight of its own.
    """
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj": (1, queries, hidden),
            f"{prefix}self_attn.k_proj": (1, keys, hidden),
            f"{prefix}self_attn.v_proj": (1, keys, hidden),
            f"{prefix}self_attn.o_proj": (1, hidden, queries),
            f"{prefix}{_ROUTER}": (1, experts, hidden),
            f"{prefix}mlp.experts.gate_proj": (experts, inner, hidden),
            f"{prefix}mlp.experts.up_proj": (experts, inner, hidden),
            f"{prefix}mlp.experts.down_proj": (experts, hidden, inner),
            f"{prefix}input_layernorm": (hidden,),
            f"{prefix}post_attention_layernorm": (hidden,),
        }
    shapes["model.norm"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    return shapes


def rounds(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether NF4 rounds a module's weight: that of a `FrozenLinear`, but for the router's."""
    return len(shape) == 3 and not name.endswith(_ROUTER)


def stored_weights(config: MixtralConfig, checkpoint: Checkpoint) -> list[StoredWeight]:
    """List the weights of a Mixtral in the model's order, and where an unquantised checkpoint has them."""
    return [
        StoredWeight(name, shape, _frozen_segments(name, checkpoint, config), None)
        if len(shape) == 3
        else StoredWeight(name, shape, [TensorSlice(f"{name}.weight")], "weight")
        for name, shape in module_shapes(config).items()
    ]


def nf4_weights(config: MixtralConfig) -> list[StoredWeight]:
    """List the same for a folder of `mixcn quantize`, which holds the model's parameters under their own names."""
    found = []
    for name, shape in module_shapes(config).items():
        parts: dict[str, tuple[int, ...]] = {"values": shape}
        if rounds(name, shape):
            count = superblocks(math.prod(shape))
            parts = {"codes": (count, SUPERBLOCK // 2), "scales": (count, BLOCKS_PER_SUPERBLOCK)}
            parts |= {"super_scale": (count,), "super_offset": (count,)}
        owner, parts = (f"{name}.storage", parts) if len(shape) == 3 else (name, {"weight": shape})
        found += [
            StoredWeight(owner, size, [TensorSlice(f"{owner}.{attribute}")], attribute)
            for attribute, size in parts.items()
        ]
    return found


def _frozen_segments(name: str, checkpoint: Checkpoint, config: MixtralConfig) -> list[TensorSlice]:
    prefix, _, leaf = name.rpartition(".")
    if prefix.endswith("mlp.experts"):
        return _expert_segments(prefix.removesuffix(".mlp.experts"), leaf, checkpoint, config)
    if prefix.endswith("mlp.gate"):
        layer = prefix.removesuffix(".mlp.gate")
        fused = f"{layer}.mlp.gate.weight"
        return [TensorSlice(fused if fused in checkpoint else f"{layer}.block_sparse_moe.gate.weight")]
    return [TensorSlice(f"{name}.weight")]


def _expert_segments(layer: str, leaf: str, checkpoint: Checkpoint, config: MixtralConfig) -> list[TensorSlice]:
    experts, intermediate = range(config.num_local_experts), config.intermediate_size
    fused = f"{layer}.mlp.experts.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"
    if fused not in checkpoint:
        name = f"{layer}.block_sparse_moe.experts.{{}}.{EXPERT_NAMES[leaf]}.weight"
        return [TensorSlice(name.format(expert)) for expert in experts]
    rows = {"gate_proj": (0, intermediate), "up_proj": (intermediate, 2 * intermediate), "down_proj": None}[leaf]
    return [TensorSlice(fused, expert, rows) for expert in experts]

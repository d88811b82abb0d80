"""Find what a module needs in a checkpoint: the two namings of experts' weights.

transformers 4 and the published checkpoints store one matrix an expert (``mlp.experts.N.gate_proj.weight``, in some
families under other names); transformers 5 can store them fused (``mlp.experts.gate_up_proj [E, 2I, H]``, gate rows
first).
"""

import math
from typing import NamedTuple

from transformers import PreTrainedConfig

from lightning_mixcn.model.architectures import Architecture, architecture_of
from lightning_mixcn.model.architectures.record import head_size
from lightning_mixcn.model.nf4.codec import BLOCKS_PER_SUPERBLOCK, SUPERBLOCK, superblocks

from .folder import Checkpoint, TensorSlice

_ROUTER = "mlp.gate.linear"


def disk_names(architecture: Architecture, module_name: str, groups: int | range) -> list[str]:
    """Return the names on disk of the groups (or some of them) of the module called ``module_name`` in memory."""
    if module_name.endswith(f".{_ROUTER}"):
        return [f"{module_name.removesuffix(_ROUTER)}{architecture.block}.gate"]
    layer, found, leaf = module_name.partition(".mlp.experts.")
    if not found:
        return [module_name]
    experts = f"{layer}.{architecture.block}.experts"
    numbers = groups if isinstance(groups, range) else range(groups)
    return [f"{experts}.{number}.{architecture.projections[leaf]}" for number in numbers]


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


def module_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Map each module of a model that has a weight to its shape, in the model's order.

    A `FrozenLinear` has ``[groups, out, in]``. A tied head has no weight of its own.
    """
    architecture = architecture_of(config)
    hidden, inner = config.hidden_size, getattr(config, architecture.expert_width)
    experts, head = config.num_local_experts, head_size(config)
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    norms = {name: (width,) for name, width in architecture.attention_norms(config).items()}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj": (1, queries, hidden),
            f"{prefix}self_attn.k_proj": (1, keys, hidden),
            f"{prefix}self_attn.v_proj": (1, keys, hidden),
            f"{prefix}self_attn.o_proj": (1, hidden, queries),
            **{f"{prefix}self_attn.{name}": shape for name, shape in norms.items()},
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


def stored_weights(config: PreTrainedConfig, checkpoint: Checkpoint) -> list[StoredWeight]:
    """List the weights of a model in the model's order, and where an unquantised checkpoint has them."""
    return [
        StoredWeight(name, shape, _frozen_segments(name, checkpoint, config), None)
        if len(shape) == 3
        else StoredWeight(name, shape, [TensorSlice(f"{name}.weight")], "weight")
        for name, shape in module_shapes(config).items()
    ]


def nf4_weights(config: PreTrainedConfig) -> list[StoredWeight]:
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


def _frozen_segments(name: str, checkpoint: Checkpoint, config: PreTrainedConfig) -> list[TensorSlice]:
    architecture, (prefix, _, leaf) = architecture_of(config), name.rpartition(".")
    experts = config.num_local_experts if prefix.endswith("mlp.experts") else 1
    apart = [TensorSlice(f"{stored}.weight") for stored in disk_names(architecture, name, experts)]
    if prefix.endswith("mlp.gate"):
        return [TensorSlice(fused)] if (fused := f"{prefix}.weight") in checkpoint else apart
    if not prefix.endswith("mlp.experts"):
        return apart
    fused = f"{prefix}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"
    if fused not in checkpoint:
        return apart
    width = getattr(config, architecture.expert_width)
    rows = {"gate_proj": (0, width), "up_proj": (width, 2 * width), "down_proj": None}[leaf]
    return [TensorSlice(fused, expert, rows) for expert in range(experts)]

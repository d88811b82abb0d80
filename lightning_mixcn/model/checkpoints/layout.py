"""Find what a module needs in a checkpoint: the two namings of Mixtral's weights.

transformers 4 and the published checkpoints store one matrix an expert (``block_sparse_moe.experts.N.w1.weight``);
transformers 5 can store them fused (``mlp.experts.gate_up_proj [E, 2I, H]``, gate rows first).
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from transformers import MixtralConfig

from lightning_mixcn.model.nf4.linear import FrozenLinear
from lightning_mixcn.model.nf4.storage import Weight

from .folder import Checkpoint, TensorSlice

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
        module: Module that owns it.
        name: Name of the module in the model.
        segments: Parts in the checkpoint, in order.
        attribute: Parameter to fill as it is stored; ``None`` for a `FrozenLinear`, whose storage takes the weight
            in its own way.
    """

    module: nn.Module
    name: str
    segments: list[TensorSlice]
    attribute: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.parameter.shape if self.attribute else self.storage.shape

    @property
    def storage(self) -> Weight:
        """The `FrozenLinear`'s storage."""
        storage: Weight = self.module.storage  # type: ignore[assignment]  # a FrozenLinear
        return storage

    @property
    def parameter(self) -> nn.Parameter:
        """The plain parameter, looked up at each call: moving a meta model to a device replaces its parameters."""
        parameter: nn.Parameter = getattr(self.module, self.attribute or "weight")
        return parameter


def entries(model: nn.Module, checkpoint: Checkpoint, config: MixtralConfig) -> Iterator[StoredWeight]:
    """Yield everything that ``model`` takes from ``checkpoint``, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            yield StoredWeight(module, name, _frozen_segments(name, checkpoint, config), None)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            tied = name == "lm_head" and config.tie_word_embeddings
            if not tied:
                yield StoredWeight(module, name, [TensorSlice(f"{name}.weight")], "weight")


def stored_entries(model: nn.Module) -> Iterator[StoredWeight]:
    """Yield the same for a folder of `mixcn quantize`, which holds the model's parameters under their own names."""
    for name, _ in model.named_parameters():  # a tied head is named once
        owner, _, attribute = name.rpartition(".")
        yield StoredWeight(model.get_submodule(owner), owner, [TensorSlice(name)], attribute)


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

"""Attaching LoRA through PEFT, and reading and writing adapters in the per-expert layout.

In memory the paper's names ``w1 w3 w2 gate`` are ``gate_proj up_proj down_proj gate.linear``: PEFT rewrites the former
for every model whose config says ``mixtral``. On disk they are the paper's again, one pair of factors an expert, which
is what stock PEFT, vLLM and llama.cpp read.
"""

import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModelForCausalLM
from torch import Tensor, nn

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.safetensors import write_safetensors
from lightning_mixcn.model.checkpoints.identity import write_identity
from lightning_mixcn.model.checkpoints.layout import disk_names
from lightning_mixcn.model.mixtral import MixtralForCausalLM, base_of
from lightning_mixcn.model.nf4.linear import FrozenLinear
from lightning_mixcn.model.sharding import copy_to_shard, full_tensor

from .adapter_file import (
    EMBEDDINGS,
    PREFIX,
    WEIGHTS_NAME,
    AdapterFile,
    StoredFactors,
)
from .layer import LoraFrozenLinear
from .layouts import normalise, per_expert
from .options import check_training_options
from .targets import adapted_modules


class MixtralPeftModel(PeftModelForCausalLM):
    """A `peft.PeftModel` whose adapters on disk are in the per-expert layout.

    Attributes:
        base_identity: Path and content hash of the base that was loaded, see `identity.base_identity`; ``None`` for
            random weights. ``base_model_name_or_path`` of the configuration is what other tools load: of a 4-bit
            folder, what that was made from.
    """

    base_identity: dict[str, str] | None = None

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]  # kwargs
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (float32), loadable by stock PEFT.

        ``base_identity.json`` beside them says which base they belong to.
        Factors are padded with zeros to the largest rank, and any scaling other than α/r is folded into B.

        Args:
            save_directory: Folder, made if missing.
            kwargs: PEFT's further options. ``is_main_process``: whether to write; where the adapter is sharded, all
                ranks must call this, and one writes. The others have no effect here.
        """
        folder = Path(save_directory)
        tensors, config = adapter_tensors(self)
        if not kwargs.get("is_main_process", True):
            return
        folder.mkdir(parents=True, exist_ok=True)
        # safetensors' own `save_file` gives the file mode 600, whatever the umask: nobody else could read it.
        (folder / WEIGHTS_NAME).unlink(missing_ok=True)
        write_safetensors(folder / WEIGHTS_NAME, tensors)
        config.save_pretrained(str(folder))
        if self.base_identity is not None:
            write_identity(folder, self.base_identity)


def attach_lora(model: MixtralForCausalLM, lora: LoraConfig) -> MixtralPeftModel:
    """Wrap ``model`` with LoRA adapters, which `reset_lora` gives their values.

    Args:
        model: The frozen base, on the meta device.
        lora: PEFT's configuration, with the names of adapter files or of memory; see `lora_targets`.

    Raises:
        ValueError: an option that is not implemented, or a name or pattern that matches nothing.
    """
    check_training_options(lora)
    groups = {name: module.groups for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    others = {name for name, _ in model.named_modules()} - groups.keys()
    chosen = adapted_modules(lora, groups, others)
    config = copy.deepcopy(lora)
    # PEFT is told the modules one by one: by itself it knows neither the paper's names nor that a key means a stack.
    config.target_modules = sorted(chosen)
    config.rank_pattern = {re.escape(name): rank for name, (rank, _) in chosen.items() if rank != config.r}
    config.alpha_pattern = {re.escape(name): alpha for name, (_, alpha) in chosen.items() if alpha != config.lora_alpha}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.task_type = "CAUSAL_LM"
    config.base_model_name_or_path = model.name_or_path or config.base_model_name_or_path
    config._register_custom_module({FrozenLinear: LoraFrozenLinear})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT asks transformers for it
        wrapped = MixtralPeftModel(model, config)
    for parameter in trained:  # PEFT froze the trained embeddings with the rest
        parameter.requires_grad_(True)
    adapted = {name: (layer.r["default"], layer.lora_alpha["default"]) for name, layer in lora_layers(wrapped)}
    assert adapted == chosen, "PEFT adapted other modules than it was told"
    return wrapped


def reset_lora(model: MixtralPeftModel, seed: int) -> None:
    """Give the active adapter its random start, the same for any number of ranks: A random, B = 0.

    Args:
        model: Its adapters have memory.
        seed: Of the random numbers; torch's global generator is left as it was.
    """
    config = _lora_config(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, layer in lora_layers(model):
            layer.reset_factors(model.active_adapter, config.init_lora_weights)


def _lora_config(model: MixtralPeftModel) -> LoraConfig:
    return cast(LoraConfig, model.peft_config[model.active_adapter])


def _weight(model: MixtralPeftModel, name: str) -> Tensor:
    return cast(nn.Linear, base_of(model).get_submodule(name)).weight


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraFrozenLinear]]:
    """Every LoRA layer with the name of the module that it adapts, e.g. ``model.layers.0.mlp.experts.up_proj``."""
    for name, module in model.named_modules():
        if isinstance(module, LoraFrozenLinear):
            yield name.removeprefix(PREFIX), module


def adapter_tensors(model: MixtralPeftModel) -> tuple[dict[str, Tensor], LoraConfig]:
    """The active adapter in the per-expert layout.

    Returns:
        float32 tensors on the CPU under PEFT's names, and the configuration that goes with them.
    """
    active, config = model.active_adapter, base_of(model).config
    factors: dict[str, StoredFactors] = {}
    for module_name, layer in lora_layers(model):
        a, b = (master.cpu() for master in layer.gathered_masters(active))
        for group, name in enumerate(disk_names(module_name, layer.groups)):
            factors[name] = StoredFactors(a[group], b[group], layer.scaling[active])
    trained = [name for name in EMBEDDINGS if _weight(model, name).requires_grad]
    saved = {name: full_tensor(_weight(model, name)).cpu().clone() for name in trained}
    base = _lora_config(model).base_model_name_or_path
    return per_expert(normalise(factors, saved, config), base, config.num_hidden_layers)


def load_adapter(model: MixtralPeftModel, adapter: AdapterFile) -> None:
    """Fill the active adapter from a folder in the per-expert layout (ours, or a published Mixtral adapter).

    Args:
        model: Its adapters have memory; each rank fills its share.
        adapter: Its scaling is kept: where it differs from `model`'s, B takes the difference.

    Raises:
        ValueError: an expert without adapter, another rank, or factors for what is not adapted here.
    """
    active = model.active_adapter
    left = set(adapter.names)
    with torch.no_grad():
        for module_name, layer in lora_layers(model):
            names, rank = disk_names(module_name, layer.groups), layer.r[active]
            for name in names:
                if name not in adapter:
                    raise UserError(f"`adapter={adapter.name!r}` has no {name}.lora_A, but `lora` adapts it here")
                if adapter.rank(name) != rank:
                    raise UserError(
                        f"`adapter={adapter.name!r}`: {name} has the rank {adapter.rank(name)}, expected {rank}. "
                        f"Set `lora.r={adapter.rank(name)}`, as the adapter was trained"
                    )
            left.difference_update(names)
            stored = [adapter.factors(name) for name in names]
            a, b = layer.weights(active)
            _fill(a, [factors.a for factors in stored], adapter.name, names)
            _fill(
                b,
                [factors.b.float() * (factors.scaling / layer.scaling[active]) for factors in stored],
                adapter.name,
                names,
            )
    for name in adapter.saved:
        _fill(_weight(model, name), [adapter.read_saved(name)], adapter.name, [name])
    for name in sorted(left):
        if adapter.factors(name).b.any():  # a B of zeros adds nothing
            raise UserError(f"`adapter={adapter.name!r}` trains {name}, which `lora.target_modules` leaves out here")


def _fill(parameter: Tensor, groups: list[Tensor], adapter: str, names: list[str]) -> None:
    """Fill a parameter with those of its groups, one below the other."""
    values = torch.cat(groups)
    if values.shape != parameter.shape:
        raise UserError(
            f"`adapter={adapter!r}`: {names[0]} has the shape {list(values.shape)}, the base has "
            f"{list(parameter.shape)}. Give the base that the adapter was trained on"
        )
    copy_to_shard(parameter, values)

"""Attaching LoRA through PEFT, and reading and writing adapters in the per-expert layout.

In memory the paper's names ``w1 w3 w2 gate`` are ``gate_proj up_proj down_proj gate.linear``: PEFT rewrites the former
for every model whose config says ``mixtral``. On disk they are the paper's again, one pair of factors an expert, which
is what stock PEFT, vLLM and llama.cpp read.
"""

import copy
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .frozen_linear import FrozenLinear
from .layout import EXPERT_NAMES
from .local_rows import copy_rows, gathered, plain_name
from .lora import LoraFrozenLinear
from .mixtral import ATTENTION_PROJECTIONS, MixtralForCausalLM

TARGETS = {name: name for name in ATTENTION_PROJECTIONS} | {
    "gate": "gate.linear",
    **{paper: ours for ours, paper in EXPERT_NAMES.items()},
}
_UNSUPPORTED = (
    "use_dora", "lora_bias", "modules_to_save", "target_parameters", "layer_replication", "trainable_token_indices",
    "fan_in_fan_out", "megatron_config",
)  # fmt: skip
WEIGHTS_NAME = "adapter_model.safetensors"
EMBEDDINGS = ("model.embed_tokens", "lm_head")
_PREFIX = "base_model.model."


class MixtralPeftModel(PeftModelForCausalLM):
    """A `peft.PeftModel` whose adapters on disk are in the per-expert layout."""

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]  # kwargs
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (float32), loadable by stock PEFT.

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
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(folder))


def attach_lora(model: MixtralForCausalLM, lora: LoraConfig) -> MixtralPeftModel:
    """Wrap ``model`` with LoRA adapters, which `reset_lora` gives their values.

    Args:
        model: The frozen base, on the meta device.
        lora: PEFT's configuration; ``target_modules`` in the paper's names, or ``all-linear``.

    Raises:
        ValueError: an option that 4-bit experts do not support, or a target that matches nothing.
    """
    config = copy.deepcopy(lora)
    for option in _UNSUPPORTED:
        if getattr(config, option, None):
            raise ValueError(f"`lora.{option}={getattr(config, option)!r}` is not supported here. Leave it out")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(f"`lora.init_lora_weights={config.init_lora_weights!r}`: expected true, false or gaussian")
    if config.bias != "none":
        raise ValueError(f"`lora.bias={config.bias!r}`: Mixtral has no biases. Leave it out")
    paper_names = _target_names(config)
    config.target_modules = sorted(TARGETS[name] for name in paper_names)
    config.rank_pattern = {_in_memory(key): value for key, value in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {_in_memory(key): value for key, value in (config.alpha_pattern or {}).items()}
    config.task_type = "CAUSAL_LM"
    config._register_custom_module({FrozenLinear: LoraFrozenLinear})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT asks transformers for it
        wrapped = MixtralPeftModel(model, config)
    for parameter in trained:  # PEFT froze the trained embeddings with the rest
        parameter.requires_grad_(True)
    _verify_adapted(wrapped, paper_names, config)
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


def base_of(model: nn.Module) -> MixtralForCausalLM:
    """The Mixtral inside a PeftModel, or the model itself."""
    return cast(MixtralForCausalLM, model.get_base_model() if isinstance(model, PeftModelForCausalLM) else model)


def _lora_config(model: MixtralPeftModel) -> LoraConfig:
    return cast(LoraConfig, model.peft_config[model.active_adapter])


def _weight(model: MixtralPeftModel, name: str) -> Tensor:
    return cast(nn.Linear, base_of(model).get_submodule(name)).weight


def _target_names(config: LoraConfig) -> set[str]:
    targets = config.target_modules
    if targets == "all-linear":
        return set(TARGETS)
    if isinstance(targets, str) or not targets:
        raise ValueError(f"`lora.target_modules={targets!r}`: expected a list of {', '.join(TARGETS)}, or all-linear")
    for name in sorted(targets):
        if name not in TARGETS:
            raise ValueError(
                f"`lora.target_modules` names {name!r}, which matches nothing in Mixtral. Expected names out of "
                f"{', '.join(TARGETS)}, or all-linear"
            )
    return set(targets)


def _in_memory(pattern: str) -> str:
    """A rank or alpha pattern in the paper's names, in ours."""
    return re.sub(r"\bw[123]\b|\bgate\b(?!\.linear)", lambda match: TARGETS[match[0]], pattern)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraFrozenLinear]]:
    """Every LoRA layer with the name of the module that it adapts, e.g. ``model.layers.0.mlp.experts.up_proj``."""
    for name, module in model.named_modules():
        if isinstance(module, LoraFrozenLinear):
            yield plain_name(name).removeprefix(_PREFIX), module


def _verify_adapted(model: MixtralPeftModel, paper_names: set[str], config: LoraConfig) -> None:
    """Every targeted projection of every chosen layer has its factors: an expert without adapter is an error."""
    adapted = {name for name, _ in lora_layers(model)}
    chosen = config.layers_to_transform
    chosen = [chosen] if isinstance(chosen, int) else chosen
    layers = range(base_of(model).config.num_hidden_layers) if chosen is None else chosen
    for layer in layers:
        for target in sorted(paper_names):
            parent = "self_attn" if target in ATTENTION_PROJECTIONS else "mlp" if target == "gate" else "mlp.experts"
            name = f"model.layers.{layer}.{parent}.{TARGETS[target]}"
            if name not in adapted:
                raise ValueError(
                    f"`lora` leaves {name} ({target}) without an adapter. Check exclude_modules and targets"
                )


def adapter_tensors(model: MixtralPeftModel) -> tuple[dict[str, Tensor], LoraConfig]:
    """The active adapter in the per-expert layout.

    Returns:
        float32 tensors on the CPU under PEFT's names, and the configuration that goes with them.
    """
    name, layers, lora = model.active_adapter, dict(lora_layers(model)), _lora_config(model)
    rank = max(layer.r[name] for layer in layers.values())
    scalings = {layer.scaling[name] for layer in layers.values()}
    scaling = scalings.pop() if len(scalings) == 1 and not lora.use_rslora else 1.0
    tensors: dict[str, Tensor] = {}
    for module_name, layer in layers.items():
        extra = rank - layer.r[name]
        a, b = (master.cpu() for master in layer.gathered_masters(name))
        a = nn.functional.pad(a, (0, 0, 0, extra))
        b = nn.functional.pad(b, (0, extra)) * (layer.scaling[name] / scaling)
        for group, disk_name in enumerate(disk_names(module_name, layer.groups)):
            tensors[f"{_PREFIX}{disk_name}.lora_A.weight"] = a[group].contiguous()
            tensors[f"{_PREFIX}{disk_name}.lora_B.weight"] = b[group].contiguous()
    _add_missing_projections(tensors, layers, rank)
    saved = [key for key in EMBEDDINGS if _weight(model, key).requires_grad]
    for key in saved:
        tensors[f"{_PREFIX}{key}.weight"] = gathered(_weight(model, key)).cpu().clone()
    config = _disk_config(model, tensors, rank, scaling, [key.removeprefix("model.") for key in saved])
    return tensors, config


def disk_names(module_name: str, groups: int) -> list[str]:
    """Names on disk of the groups of the module that is called ``module_name`` in memory."""
    if module_name.endswith(".mlp.gate.linear"):
        return [module_name.replace(".mlp.gate.linear", ".block_sparse_moe.gate")]
    layer, found, leaf = module_name.partition(".mlp.experts.")
    if not found:
        return [module_name]
    return [f"{layer}.block_sparse_moe.experts.{expert}.{EXPERT_NAMES[leaf]}" for expert in range(groups)]


def _add_missing_projections(tensors: dict[str, Tensor], layers: dict[str, LoraFrozenLinear], rank: int) -> None:
    """Where only some of w1, w2, w3 are adapted, write the others with B = 0: stock PEFT needs all three."""
    for module_name, layer in layers.items():
        parent, found, leaf = module_name.partition(".mlp.experts.")
        if not found:
            continue
        hidden, intermediate = int(layer.in_features or 0), int(layer.out_features or 0)
        if leaf == "down_proj":
            hidden, intermediate = intermediate, hidden
        for other in EXPERT_NAMES:
            in_features, out_features = (intermediate, hidden) if other == "down_proj" else (hidden, intermediate)
            for disk_name in disk_names(f"{parent}.mlp.experts.{other}", layer.groups):
                key = f"{_PREFIX}{disk_name}.lora_{{}}.weight"
                tensors.setdefault(key.format("A"), torch.zeros(rank, in_features))
                tensors.setdefault(key.format("B"), torch.zeros(out_features, rank))


def _disk_config(
    model: MixtralPeftModel, tensors: dict[str, Tensor], rank: int, scaling: float, saved: list[str]
) -> LoraConfig:
    config, alpha = _lora_config(model), scaling * rank
    names = {key.removeprefix(_PREFIX).split(".lora_")[0].rpartition(".")[2] for key in tensors if ".lora_" in key}
    return LoraConfig(
        r=rank,
        lora_alpha=round(alpha) if math.isclose(alpha, round(alpha)) else alpha,  # type: ignore[arg-type]  # PEFT divides it, so a float serves
        lora_dropout=config.lora_dropout,
        target_modules=sorted(names),
        layers_to_transform=config.layers_to_transform,
        modules_to_save=saved or None,
        base_model_name_or_path=config.base_model_name_or_path,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def load_adapter(model: MixtralPeftModel, path: str | Path) -> None:
    """Fill the active adapter from a folder in the per-expert layout (ours, or a published Mixtral adapter).

    Raises:
        FileNotFoundError: no such adapter.
        ValueError: an expert without adapter, another rank, or factors for what is not adapted here.
    """
    file = Path(path) / WEIGHTS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"`adapter={str(path)!r}` holds no {WEIGHTS_NAME}. Give a PEFT adapter folder")
    stored = LoraConfig.from_pretrained(str(path))
    stored_scaling = stored.lora_alpha / (math.sqrt(stored.r) if stored.use_rslora else stored.r)
    with safe_open(file, framework="pt") as reader, torch.no_grad():
        keys = set(reader.keys())
        for module_name, layer in lora_layers(model):
            names = disk_names(module_name, layer.groups)
            for factor, weight in zip("AB", layer.weights(model.active_adapter), strict=True):
                wanted = [f"{_PREFIX}{name}.lora_{factor}.weight" for name in names]
                if missing := [key for key in wanted if key not in keys]:
                    raise ValueError(f"`adapter={str(path)!r}` has no {missing[0]}, but `lora` adapts it here")
                keys -= set(wanted)
                values, shape = [reader.get_tensor(key) for key in wanted], (len(weight) // len(names), weight.shape[1])
                if values[0].shape != shape:
                    raise ValueError(
                        f"`adapter={str(path)!r}`: {wanted[0]} is {tuple(values[0].shape)}, expected {shape}. "
                        f"Set `lora.r={stored.r}`, as the adapter was trained"
                    )
                scale = stored_scaling / layer.scaling[model.active_adapter] if factor == "B" else 1.0
                copy_rows(weight, torch.cat(values) * scale)
        _load_rest(model, reader, keys, path)


def _load_rest(model: MixtralPeftModel, reader: Any, keys: set[str], path: str | Path) -> None:
    for key in sorted(keys):
        values = reader.get_tensor(key)
        module_name = key.removeprefix(_PREFIX).removesuffix(".weight")
        if module_name in EMBEDDINGS:
            weight = _weight(model, module_name)
            if values.shape != weight.shape:
                raise ValueError(
                    f"`adapter={str(path)!r}`: {key} is {tuple(values.shape)}, the base has {tuple(weight.shape)}"
                )
            copy_rows(weight, values)
        elif key.endswith("lora_B.weight") and values.any():  # a B of zeros adds nothing
            raise ValueError(
                f"`adapter={str(path)!r}` trains {module_name}, which `lora.target_modules` leaves out here"
            )

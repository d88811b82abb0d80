"""Write a PEFT adapter folder in a layout that stock PEFT reads: a pair of factors an expert, or fused stacks.

Per expert (transformers 4, vLLM, llama.cpp; PEFT converts it for transformers 5) it reads right only with all three
matrices of an expert present, equal ranks and plain α/R, so that is what is written. The fused layout is PEFT's own for
transformers 5 (``target_parameters``).

Legend: E = experts, R = rank, H = hidden, I = intermediate.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedConfig

from lightning_mixcn.files.hub import public_name
from lightning_mixcn.files.safetensors import write_safetensors
from lightning_mixcn.model.architectures import Architecture, architecture_of
from lightning_mixcn.model.checkpoints.layout import disk_names, module_shapes

from .adapter_file import PREFIX, START_RANK, WEIGHTS_NAME, StoredFactors

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PARAMETERS = {"gate": "mlp.gate.weight", "gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}


def write_adapter(
    folder: Path,
    factors: Mapping[str, StoredFactors],
    saved: Mapping[str, Tensor],
    config: PreTrainedConfig,
    base: str | None,
    *,
    fused: bool = False,
    start_rank: int = 0,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (float32).

    Args:
        folder: An existing folder.
        factors: Name of a matrix → its factors, of any ranks and scalings.
        saved: Name of an embedding that was trained as a whole → its values.
        config: The base's configuration.
        base: Base of the adapter; ``base_model_name_or_path`` is its `public_name`.
        fused: Write the fused layout instead of a pair of factors an expert.
        start_rank: Rank of the start from the rounding error that the factors subtract, see `AdapterFile.start_rank`.
    """
    adapter = _normalise(factors, saved, config)
    layout = _fused_layout if fused else _per_expert_layout
    tensors, lora = layout(adapter, _config(adapter, base), config.num_hidden_layers)
    # safetensors' own `save_file` gives the file mode 600, whatever the umask: nobody else could read it.
    (folder / WEIGHTS_NAME).unlink(missing_ok=True)
    metadata = {START_RANK: str(start_rank)} if start_rank else {}
    write_safetensors(folder / WEIGHTS_NAME, tensors, with_sum=True, metadata=metadata)
    lora.save_pretrained(str(folder))


@dataclass
class _NormalisedAdapter:
    """Factors of one rank and one scaling, with all matrices of every expert of a layer in which any is adapted.

    Attributes:
        factors: Name of a matrix → ``(A [R, in], B [out, R])``, float32.
        saved: Embeddings that were trained as a whole.
        rank: R.
        alpha: ``alpha / rank`` is the scaling.
        architecture: Family of the base.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    saved: dict[str, Tensor]
    rank: int
    alpha: int
    architecture: Architecture

    def layers(self, names: Iterable[str]) -> set[int]:
        """Return the layers of the matrices of these names."""
        return {int(match[1]) for name in names if (match := _LAYER.match(name))}


def _normalise(
    factors: Mapping[str, StoredFactors], saved: Mapping[str, Tensor], config: PreTrainedConfig
) -> _NormalisedAdapter:
    """Pad to the largest rank, fold scalings into B where they differ, and complete the experts with zeros."""
    rank = max(len(stored.a) for stored in factors.values())
    alphas = {stored.scaling * rank for stored in factors.values()}
    uniform = len(alphas) == 1 and min(alphas).is_integer()
    alpha = int(min(alphas)) if uniform else rank
    pairs = {}
    for name, (a, b, scaling) in factors.items():
        extra = rank - len(a)
        pairs[name] = (
            F.pad(a.float(), (0, 0, 0, extra)).contiguous(),
            F.pad(b.float(), (0, extra)).mul(scaling * rank / alpha).contiguous(),
        )
    adapter = _NormalisedAdapter(pairs, dict(saved), rank, alpha, architecture_of(config))
    layers = adapter.layers(name for name in factors if ".experts." in name)
    for module, shape in module_shapes(config).items():
        if (match := _LAYER.match(module)) and int(match[1]) in layers and ".mlp.experts." in module:
            experts, out_features, in_features = shape
            for name in disk_names(adapter.architecture, module, experts):
                pairs.setdefault(name, (torch.zeros(rank, in_features), torch.zeros(out_features, rank)))
    return adapter


def _per_expert_layout(
    adapter: _NormalisedAdapter, config: LoraConfig, num_layers: int
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Return tensors under PEFT's names, and the configuration with its targets."""
    tensors = _saved(adapter)
    for name, (a, b) in adapter.factors.items():
        tensors |= _pair(name, a, b)
    by_target: dict[str, list[str]] = {}
    for name in adapter.factors:
        by_target.setdefault(name.rpartition(".")[2], []).append(name)
    # Whole names where a layer is left out: PEFT 0.15 compares `layers_to_transform` with the expert's number.
    config.target_modules = sorted(
        target
        for short, names in by_target.items()
        for target in ([short] if len(adapter.layers(names)) == num_layers else names)
    )
    return tensors, config


def _fused_layout(
    adapter: _NormalisedAdapter, config: LoraConfig, num_layers: int
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Return the same in the fused layout.

    gate_up_proj has the factors of gate and of up side by side (rank 2R). A's rows are expert-major, B's columns
    rank-major (``k·E + e``), as `peft.tuners.lora.layer.ParamWrapper` reads them.
    """
    tensors = _saved(adapter)
    first = f".experts.0.{adapter.architecture.projections['gate_proj']}"
    targets: dict[str, set[int]] = {}
    for name in adapter.factors:
        layer, block, leaf = _split(name)
        if block == "self_attn":
            tensors |= _pair(name, *adapter.factors[name])
            targets.setdefault(leaf, set()).add(layer)
        elif leaf == "gate":
            tensors |= _pair(f"model.layers.{layer}.mlp.gate", *adapter.factors[name])
            targets.setdefault(_PARAMETERS["gate"], set()).add(layer)
        elif name.endswith(first):
            experts = f"{name.removesuffix(first)}.experts"
            prefix = f"model.layers.{layer}.mlp.experts"
            tensors |= _pair(f"{prefix}.base_layer", *_fused_gate_up(adapter, experts))
            tensors |= _pair(prefix, *_flat(*_stack(adapter, experts, "down_proj")))
            for part in ("gate_up", "down"):
                targets.setdefault(_PARAMETERS[part], set()).add(layer)
    names = {target: _full_names(target, layers, num_layers) for target, layers in targets.items()}
    config.target_modules = sorted(name for target, found in names.items() if "." not in target for name in found)
    config.target_parameters = sorted(name for target, found in names.items() if "." in target for name in found)
    if _PARAMETERS["gate_up"] in targets:
        config.rank_pattern = {_PARAMETERS["gate_up"]: 2 * adapter.rank}
        config.alpha_pattern = {_PARAMETERS["gate_up"]: 2 * adapter.alpha}
    return tensors, config


def _fused_gate_up(adapter: _NormalisedAdapter, experts: str) -> tuple[Tensor, Tensor]:
    """Return ``A [E·2R, H]``, ``B [2I, 2R·E]``: ranks 0…R−1 are gate's and give rows 0…I−1, the others up's."""
    gate, up = (_stack(adapter, experts, leaf) for leaf in ("gate_proj", "up_proj"))
    a_ERH = torch.cat([gate[0], up[0]], dim=1)
    b_EIR = torch.cat([F.pad(gate[1], (0, adapter.rank)), F.pad(up[1], (adapter.rank, 0))], dim=1)
    return _flat(a_ERH, b_EIR)


def _stack(adapter: _NormalisedAdapter, experts: str, leaf: str) -> tuple[Tensor, Tensor]:
    """Return ``[E, R, in]`` and ``[E, out, R]`` of a projection."""
    leaf = adapter.architecture.projections[leaf]
    count = sum(name.startswith(f"{experts}.") and name.endswith(f".{leaf}") for name in adapter.factors)
    pairs = [adapter.factors[f"{experts}.{expert}.{leaf}"] for expert in range(count)]
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


def _flat(a_ERI: Tensor, b_EOR: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``[E·R, in]`` and ``[out, R·E]``."""
    return a_ERI.flatten(0, 1), b_EOR.permute(1, 2, 0).flatten(1, 2).contiguous()


def _split(name: str) -> tuple[int, str, str]:
    """Split a matrix's name into layer, block and last part."""
    parts = name.split(".")
    return int(parts[2]), parts[3], parts[-1]


def _full_names(target: str, layers: set[int], num_layers: int) -> list[str]:
    """Return the names of a target that match these layers and no other."""
    if len(layers) == num_layers:
        return [target]
    block = "" if "." in target else "self_attn."
    return [f"model.layers.{layer}.{block}{target}" for layer in sorted(layers)]


def _pair(name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}


def _saved(adapter: _NormalisedAdapter) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}.weight": values for name, values in adapter.saved.items()}


def _config(adapter: _NormalisedAdapter, base: str | None) -> LoraConfig:
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,  # it is for training; stock PEFT refuses any other on experts
        modules_to_save=sorted(name.removeprefix("model.") for name in adapter.saved) or None,
        base_model_name_or_path=public_name(base) if base else None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )

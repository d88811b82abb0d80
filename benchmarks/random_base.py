"""Mixtures with random weights, for measurements without a download: in a folder, or in memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lightning_mixcn.model.architectures import architecture_named, architecture_of

_8X7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_OLMOE_1B_7B = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_local_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
}
_QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
# Presets for a CPU have a small vocabulary, so that the head is about as small a part of two layers as it is of 16 to
# 48. Without `model_type` it is a Mixtral.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu-small": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
        "max_position_embeddings": 8192,
    },
    "load": {
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
        "max_position_embeddings": 8192,
    },
    "cpu-olmoe": _OLMOE_1B_7B | {"num_hidden_layers": 2, "vocab_size": 2048},
    "cpu-qwen3": _QWEN3_30B_A3B | {"num_hidden_layers": 2, "vocab_size": 2048},
    "layer-8x7b": _8X7B | {"num_hidden_layers": 1, "vocab_size": 2048},
    "full-8x7b": _8X7B | {"num_hidden_layers": 32, "vocab_size": 32000},
    "full-olmoe": _OLMOE_1B_7B | {"num_hidden_layers": 16, "vocab_size": 50304},
    "full-qwen3": _QWEN3_30B_A3B | {"num_hidden_layers": 48, "vocab_size": 151936},
}
_CHUNK = 2**25  # elements drawn at a time, a whole number of superblocks


def config_of(
    preset: str, *, num_hidden_layers: int | None = None, hidden_size: int | None = None, width: int | None = None
) -> PreTrainedConfig:
    """Return sizes of a preset.

    Args:
        preset: Key of `PRESETS`.
        num_hidden_layers: In place of the preset's, as the next two, to try a script on a small model.
        hidden_size: Width of the model.
        width: Width of an expert.
    """
    architecture = architecture_named(PRESETS[preset].get("model_type", "mixtral"))
    given = {"num_hidden_layers": num_hidden_layers, "hidden_size": hidden_size, architecture.expert_width: width}
    chosen = PRESETS[preset] | {name: size for name, size in given.items() if size is not None}
    chosen.pop("model_type", None)
    config: PreTrainedConfig = architecture.config(
        **chosen, rope_theta=1e6, tie_word_embeddings=False, dtype="bfloat16"
    )
    return config


def expert_width(config: Any) -> int:
    """Return the width of an expert, which has another name in each family's configuration."""
    return int(getattr(config, architecture_of(config).expert_width))


def write_random_base(config: PreTrainedConfig, folder: Path) -> None:
    """Write a Hugging Face folder in bf16 with the published names, a shard a layer; one layer is held at a time."""
    from lightning_mixcn.testing import byte_tokenizer

    generator = torch.Generator().manual_seed(0)
    shards = list(_shards(config).values())
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _values(shape, config.initializer_range, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config.architectures = [architecture_of(config).causal_lm.__name__]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)  # Unsloth loads one


def random_model(config: PreTrainedConfig, lora: Any, device: torch.device) -> nn.Module:
    """Make ours in 4 bits, its weights drawn on the device and quantised chunk by chunk; no 16-bit model is held.

    Args:
        config: Sizes; embedding and head are not tied.
        lora: PEFT's configuration, or ``None`` for no adapters.
        device: Device of the model.
    """
    from lightning_mixcn.model import build_moe
    from lightning_mixcn.model.causal_lm import base_of, move_to_device
    from lightning_mixcn.model.lora.attach import reset_lora
    from lightning_mixcn.model.nf4.linear import FrozenLinear

    model = build_moe(config, lora=lora, device="meta")
    base: Any = base_of(model)
    model.to_empty(device=device)
    move_to_device(base, device)
    generator = torch.Generator(device).manual_seed(0)
    for module in base.modules():
        if isinstance(module, FrozenLinear):
            for start, values in drawn_values(module.storage.shape, config.initializer_range, generator):
                module.storage.write(start, values)
        elif isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=config.initializer_range, generator=generator)
        elif isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 1:  # a norm's
            nn.init.ones_(weight)
    if lora is not None:
        reset_lora(model, 0)  # type: ignore[arg-type]  # it has adapters
    return model


def drawn_values(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Draw a weight chunk by chunk; yield where each begins in the flattened weight, and its float32 values."""
    numel = torch.Size(shape).numel()
    for start in range(0, numel, _CHUNK):
        size = (min(_CHUNK, numel - start),)
        yield start, torch.empty(size, device=generator.device).normal_(std=std, generator=generator)


def _shards(config: PreTrainedConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return names and shapes of the tensors of each layer, by its number, and those of the ends under ``""``."""
    from lightning_mixcn.model.checkpoints.layout import disk_names, module_shapes

    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for module, shape in module_shapes(config).items():
        layer = module.split(".")[2] if module.startswith("model.layers.") else ""
        # A matrix of a stack has a name of its own.
        names = disk_names(architecture_of(config), module, shape[0] if len(shape) == 3 else 1)
        shards.setdefault(layer, {}).update({f"{name}.weight": shape[-2:] for name in names})
    return shards


def _values(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=std, generator=generator)

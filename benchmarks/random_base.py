"""Mixtrals with random weights, for measurements without a download: in a folder, or in memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

_8X7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
# `cpu-small` has a small vocabulary, so that the head is about as small a part of two layers as it is of Mixtral's 32.
PRESETS = {
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
    "layer-8x7b": _8X7B | {"num_hidden_layers": 1, "vocab_size": 2048},
    "full-8x7b": _8X7B | {"num_hidden_layers": 32, "vocab_size": 32000},
}
_CHUNK = 2**25  # elements drawn at a time, a whole number of superblocks


def config_of(preset: str, **sizes: int | None) -> transformers.MixtralConfig:
    """Return sizes of a preset; ``sizes`` that are not ``None`` replace them, to try a script on a small model."""
    chosen = PRESETS[preset] | {name: size for name, size in sizes.items() if size is not None}
    return transformers.MixtralConfig(**chosen, rope_theta=1e6, tie_word_embeddings=False, dtype="bfloat16")


def write_random_base(config: transformers.MixtralConfig, folder: Path) -> None:
    """Write a Hugging Face folder in bf16 with the published names, a shard a layer; one layer is held at a time."""
    from lightning_mixcn.testing import byte_tokenizer

    generator = torch.Generator().manual_seed(0)
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    shards = [_layer(config, layer, width) for layer in range(config.num_hidden_layers)] + [_ends(config)]
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _values(shape, config.initializer_range, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)  # Unsloth loads one


def random_model(config: transformers.MixtralConfig, lora: Any, device: torch.device) -> nn.Module:
    """Make ours in 4 bits, its weights drawn on the device and quantised chunk by chunk; no 16-bit model is held.

    Args:
        config: Sizes; embedding and head are not tied.
        lora: PEFT's configuration, or ``None`` for no adapters.
        device: Device of the model.
    """
    from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

    from lightning_mixcn.model import build_mixtral
    from lightning_mixcn.model.causal_lm import base_of, move_to_device
    from lightning_mixcn.model.lora.attach import reset_lora
    from lightning_mixcn.model.nf4.linear import FrozenLinear

    model = build_mixtral(config, lora=lora, device="meta")
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
        elif isinstance(module, MixtralRMSNorm):
            nn.init.ones_(module.weight)
    if lora is not None:
        reset_lora(model, 0)  # type: ignore[arg-type]  # it has adapters
    return model


def drawn_values(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Draw a weight chunk by chunk; yield where each begins in the flattened weight, and its float32 values."""
    numel = torch.Size(shape).numel()
    for start in range(0, numel, _CHUNK):
        size = (min(_CHUNK, numel - start),)
        yield start, torch.empty(size, device=generator.device).normal_(std=std, generator=generator)


def _layer(config: transformers.MixtralConfig, layer: int, width: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, prefix = config.hidden_size, config.intermediate_size, f"model.layers.{layer}."
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (width, hidden),
        "self_attn.v_proj": (width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "block_sparse_moe.gate": (config.num_local_experts, hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for expert in range(config.num_local_experts):
        for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
            shapes[f"block_sparse_moe.experts.{expert}.{name}"] = shape
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def _ends(config: transformers.MixtralConfig) -> dict[str, tuple[int, ...]]:
    table = (config.vocab_size, config.hidden_size)
    return {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": table[1:]}


def _values(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=std, generator=generator)

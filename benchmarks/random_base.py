"""A Mixtral folder in bf16 with random weights, of the sizes of a preset, for measurements without a download."""

from pathlib import Path

import torch
import transformers

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
    "layer-8x7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 2048,
        "max_position_embeddings": 8192,
    },
}


def config_of(preset: str) -> transformers.MixtralConfig:
    """Sizes of a preset."""
    return transformers.MixtralConfig(**PRESETS[preset], rope_theta=1e6, tie_word_embeddings=False)


def write_random_base(preset: str, folder: Path) -> None:
    """Write a Hugging Face folder, normal weights of the configuration's standard deviation."""
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config_of(preset)).to(torch.bfloat16).save_pretrained(folder)

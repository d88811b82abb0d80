"""A tiny model of whole superblocks, and stock transformers with weights that bitsandbytes rounded."""

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from lightning_mixcn.model.architectures import architecture_named
from lightning_mixcn.testing import save_tiny_model
from tests.studies.experts.stock_experts import stock_model

SUPERBLOCK = 16_384


def save_whole_superblocks(folder: Path, family: str = "mixtral") -> Path:
    """Every matrix has 128 × 128 weights."""
    sizes = {"hidden_size": 128, architecture_named(family).expert_width: 128, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 8} | ({} if family == "olmoe" else {"head_dim": 16})
    return save_tiny_model(folder, family, **sizes)


def rounded_stock_model(folder: Path, *, double: bool) -> Any:
    """Stock transformers in float32; every attention and expert matrix through bitsandbytes and back."""
    model = stock_model(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name or ".experts." in name:
                matrices = parameter.view(-1, SUPERBLOCK)
                matrices.copy_(torch.stack([_roundtrip(part, double) for part in matrices]))
    return model


def _roundtrip(values_n: Tensor, double: bool) -> Tensor:
    """One superblock: bitsandbytes' double quantisation of it alone is what this package stores."""
    packed, state = bnb.quantize_4bit(values_n, blocksize=64, compress_statistics=double, quant_type="nf4")
    rounded: Tensor = bnb.dequantize_4bit(packed, state).flatten()
    return rounded

"""Adapters that the tests of exports share: one of a run, and one that another tool might have written."""

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_mixcn.model import MoePeftModel, load_mixtral
from tests.model.trained_values import draw_trained

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]


def save_adapter(
    base: Path,
    folder: Path,
    *,
    train_embeddings: bool = False,
    quantization: str = "none",
    scale: float = 0.1,
    **lora: Any,
) -> MoePeftModel:
    """Return a run's adapter with random factors, and the model that it was saved from."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    model = load_mixtral(
        base,
        quantization=quantization,
        dtype="float32",
        lora=peft.LoraConfig(**(settings | lora)),
        train_embeddings=train_embeddings,
    )
    assert isinstance(model, MoePeftModel)
    draw_trained(model, scale)
    model.save_pretrained(folder)
    return model.eval()


def write_by_hand(base: Path, folder: Path, sizes: dict[str, int], rank: int = 3) -> dict[str, Tensor]:
    """Return an adapter in the per-expert layout as PEFT on transformers 4 wrote them, bf16, without any of our code.

    Args:
        base: What ``base_model_name_or_path`` says.
        folder: Made.
        sizes: ``vocab_size``, ``hidden_size``, ``intermediate_size``, ``num_hidden_layers``, ``num_local_experts`` and
            ``kv`` (width of keys).
        rank: Of all factors.

    Returns:
        What was written, by key.
    """
    generator, hidden, inner = torch.Generator().manual_seed(7), sizes["hidden_size"], sizes["intermediate_size"]
    shapes = {}
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"base_model.model.model.layers.{layer}"
        shapes[f"{prefix}.self_attn.v_proj"] = (sizes["kv"], hidden)
        shapes[f"{prefix}.block_sparse_moe.gate"] = (sizes["num_local_experts"], hidden)
        for expert in range(sizes["num_local_experts"]):
            for name, shape in {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}.items():
                shapes[f"{prefix}.block_sparse_moe.experts.{expert}.{name}"] = shape
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, in_features, generator=generator) * 0.1
        tensors[f"{name}.lora_B.weight"] = torch.randn(out_features, rank, generator=generator) * 0.1
    for name in ("model.embed_tokens", "lm_head"):
        values = torch.randn(sizes["vocab_size"], hidden, generator=generator) * 0.1
        tensors[f"base_model.model.{name}.weight"] = values
    tensors = {key: values.bfloat16() for key, values in tensors.items()}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=7,
        lora_dropout=0.05,
        target_modules=["v_proj", "gate", "w1", "w2", "w3"],
        modules_to_save=["embed_tokens", "lm_head"],
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
    )
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors

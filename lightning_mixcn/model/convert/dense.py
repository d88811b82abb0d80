"""Read a dense Llama- or Mistral-architecture model for upcycling: its config, tensors and tokenizer."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.tokenizer.files import GENERATION_FILE, tokenizer_files

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


@dataclass(frozen=True)
class DenseSource:
    """A dense model to upcycle.

    Attributes:
        name: Name that the user gave, for messages.
        config: A LlamaConfig or MistralConfig.
        shapes: Name → shape of each tensor, in the order of the layers: exactly those of the architecture.
        dtype: The dtype of the feed-forward weights.
        read: Name → tensor, a private copy.
        save_tokenizer: Writes the tokenizer's files into a folder.
    """

    name: str
    config: "PreTrainedConfig"
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    read: Callable[[str], Tensor]
    save_tokenizer: Callable[[Path], None]


def _open_folder(name: str, folder: Path) -> DenseSource:
    checkpoint = Checkpoint(folder)
    config = dense_config(name, checkpoint.config)
    found = {tensor: checkpoint.shape(tensor) for tensor in checkpoint.names()}
    if config.tie_word_embeddings and "lm_head.weight" in found:
        config.tie_word_embeddings = checkpoint.ties_head()
        if config.tie_word_embeddings:
            del found["lm_head.weight"]
    shapes = check_tensors(name, config, found)
    for tensor in shapes:
        if checkpoint.dtype(tensor) not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(
                f"`src={name}`: tensor {tensor!r} has dtype {checkpoint.dtype(tensor)}, expected float32, float16 or "
                "bfloat16. Give an unquantised model"
            )
    return DenseSource(
        name=name,
        config=config,
        shapes=shapes,
        dtype=checkpoint.dtype("model.layers.0.mlp.gate_proj.weight"),
        read=checkpoint.read,
        save_tokenizer=lambda out: _copy_tokenizer(folder, out),
    )


def _copy_tokenizer(folder: Path, out: Path) -> None:
    generation = folder / GENERATION_FILE
    for file in [*tokenizer_files(folder), *([generation] if generation.is_file() else [])]:
        shutil.copyfile(file, out / file.name)


def dense_config(name: str, raw: dict[str, Any]) -> "PreTrainedConfig":
    """Turn the content of a config.json into a LlamaConfig or MistralConfig, or refuse it.

    Args:
        name: Name that the user gave, for messages.
        raw: The content.

    Returns:
        The config, with rope parameters in transformers 5's form whatever wrote them.

    Raises:
        ValueError: Mixtral cannot express it; the message says what and why.
    """
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        moe = "; a mixture of experts cannot be upcycled again" if "expert" in " ".join(raw) else ""
        raise UserError(
            f"`src={name}` has model_type {model_type!r}, expected a dense model of type llama or mistral{moe}. "
            "Give a Llama- or Mistral-architecture model"
        )
    refused = {
        "architectures": raw.get("architectures") not in (None, [ARCHITECTURES[model_type]]),
        "attention_bias": raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        "quantization_config": raw.get("quantization_config"),
        "layer_types": len(set(raw.get("layer_types") or ())) > 1,
        "hidden_act": raw.get("hidden_act", "silu") not in ACT2FN,
    }
    for key in (key for key, present in refused.items() if present):
        raise UserError(
            f"`src={name}` has {key}={raw[key]!r} in its config, which a Mixtral cannot express. "
            f"Give a plain, unquantised {ARCHITECTURES[model_type]}"
        )
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**raw)
    except Exception as error:  # transformers raises its own kinds for what does not validate
        reason = " ".join(str(error).split())
        raise UserError(f"`src={name}`: transformers refuses its config.json ({reason}). Mend that file") from error
    return config


def expected_shapes(config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
    """Map the name of every tensor of a dense Llama or Mistral to its shape, in the order of the layers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensors(
    name: str, config: "PreTrainedConfig", found: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Compare the tensors found with those of the architecture, and return the latter.

    Args:
        name: Name that the user gave, for messages.
        config: The dense model's.
        found: Name → shape of what is there; old folders' ``rotary_emb.inv_freq`` is recomputed and so ignored.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place in a Mixtral (a bias, for instance).
    """
    expected = expected_shapes(config)
    for tensor, shape in expected.items():
        if tensor not in found:
            raise UserError(f"`src={name}`: tensor {tensor!r} is missing. Copy or download the model again")
        if found[tensor] != shape:
            raise UserError(
                f"`src={name}`: tensor {tensor!r} has shape {list(found[tensor])}, its config says {list(shape)}. "
                "Check that config.json belongs to these weights"
            )
    for tensor in found:
        if tensor not in expected and not tensor.endswith("rotary_emb.inv_freq"):
            raise UserError(
                f"`src={name}`: tensor {tensor!r} has no place in a Mixtral (which has no biases and no layers but "
                f"attention and experts). Give a plain {ARCHITECTURES[config.model_type]}"
            )
    return expected

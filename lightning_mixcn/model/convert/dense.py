"""Read a dense model for upcycling: its config, tensors and tokenizer."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.architectures import Architecture, architecture_named, upcycled_families
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.tokenizer.files import GENERATION_FILE, tokenizer_files

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class DenseSource:
    """A dense model to upcycle.

    Attributes:
        name: Name that the user gave, for messages.
        config: transformers' configuration of it.
        architecture: Family of mixtures that it becomes.
        shapes: Name → shape of each tensor, in the order of the layers: exactly those of the architecture.
        dtype: The dtype of the feed-forward weights.
        read: Name → tensor, a private copy.
        save_tokenizer: Writes the tokenizer's files into a folder.
    """

    name: str
    config: "PreTrainedConfig"
    architecture: Architecture
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    read: Callable[[str], Tensor]
    save_tokenizer: Callable[[Path], None]


def _open_folder(name: str, folder: Path, family: str | None) -> DenseSource:
    checkpoint = Checkpoint(folder)
    architecture = continued_by(name, checkpoint.config, family)
    config = dense_config(name, checkpoint.config, architecture)
    found = {tensor: checkpoint.shape(tensor) for tensor in checkpoint.names()}
    if config.tie_word_embeddings and "lm_head.weight" in found:
        config.tie_word_embeddings = checkpoint.ties_head()
        if config.tie_word_embeddings:
            del found["lm_head.weight"]
    shapes = check_tensors(name, config, architecture, found)
    for tensor in shapes:
        if checkpoint.dtype(tensor) not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(
                f"`src={name}`: tensor {tensor!r} has dtype {checkpoint.dtype(tensor)}, expected float32, float16 or "
                "bfloat16. Give an unquantised model"
            )
    return DenseSource(
        name=name,
        config=config,
        architecture=architecture,
        shapes=shapes,
        dtype=checkpoint.dtype("model.layers.0.mlp.gate_proj.weight"),
        read=checkpoint.read,
        save_tokenizer=lambda out: _copy_tokenizer(folder, out),
    )


def _copy_tokenizer(folder: Path, out: Path) -> None:
    generation = folder / GENERATION_FILE
    for file in [*tokenizer_files(folder), *([generation] if generation.is_file() else [])]:
        shutil.copyfile(file, out / file.name)


def continued_by(name: str, raw: Mapping[str, Any], family: str | None) -> Architecture:
    """Find the family of mixtures that a dense model becomes.

    Args:
        name: Name that the user gave, for messages.
        raw: Content of its config.json.
        family: Type of the family that is wanted; ``None`` for the one there is.

    Raises:
        ValueError: no family continues such a model, or not the one that is wanted.
    """
    families, model_type = upcycled_families(), raw.get("model_type")
    if model_type not in families:
        *types, last = families
        moe = "; a mixture of experts cannot be upcycled again" if "expert" in " ".join(raw) else ""
        raise UserError(
            f"`src={name}` has model_type {model_type!r}, expected a dense model of type {', '.join(types)} or "
            f"{last}{moe}. Give one of these"
        )
    found = families[model_type]
    if family not in (None, found.model_type):
        wanted = architecture_named(str(family))
        norms = "norms" if wanted.attention_norms(wanted.config()) else "no norms"
        raise UserError(
            f"`family={family}`, but `src={name}` has model_type {model_type!r}, which becomes {found.model_type} "
            f"only: {wanted.title} has {norms} of queries and keys, unlike {model_type}. Leave `family` out"
        )
    return found


def dense_config(name: str, raw: dict[str, Any], architecture: Architecture) -> "PreTrainedConfig":
    """Turn the content of a config.json into transformers' configuration, or refuse it.

    Args:
        name: Name that the user gave, for messages.
        raw: The content.
        architecture: Family of mixtures that the model becomes.

    Returns:
        The config, with rope parameters in transformers 5's form whatever wrote them.

    Raises:
        ValueError: the family cannot express it; the message says what and why.
    """
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    refused = {
        "architectures": raw.get("architectures") not in (None, [_class_name(raw["model_type"])]),
        "attention_bias": raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        "quantization_config": raw.get("quantization_config"),
        # Qwen's, of some layers only; nothing reads it in other families.
        "use_sliding_window": raw.get("use_sliding_window") and hasattr(architecture.config, "use_sliding_window"),
        "layer_types": len(set(raw.get("layer_types") or ())) > 1,
        "hidden_act": raw.get("hidden_act", "silu") not in ACT2FN,
    }
    for key in (key for key, present in refused.items() if present):
        raise UserError(
            f"`src={name}` has {key}={raw[key]!r} in its config, which a {architecture.title} cannot "
            f"express. Give a plain, unquantised {_class_name(raw['model_type'])}"
        )
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**raw)
    except Exception as error:  # transformers raises its own kinds for what does not validate
        reason = " ".join(str(error).split())
        raise UserError(f"`src={name}`: transformers refuses its config.json ({reason}). Mend that file") from error
    return config


def _class_name(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def expected_shapes(config: "PreTrainedConfig", architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Map the name of every tensor of a dense model to its shape, in the order of the layers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    norms = architecture.attention_norms(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, queries),
            **{f"{prefix}self_attn.{norm}.weight": (width,) for norm, width in norms.items()},
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
    name: str, config: "PreTrainedConfig", architecture: Architecture, found: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Compare the tensors found with those of the architecture, and return the latter.

    Args:
        name: Name that the user gave, for messages.
        config: The dense model's.
        architecture: Family of mixtures that it becomes.
        found: Name → shape of what is there; old folders' ``rotary_emb.inv_freq`` is recomputed and so ignored.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place in the family (a bias, for instance).
    """
    expected = expected_shapes(config, architecture)
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
                f"`src={name}`: tensor {tensor!r} has no place in a {architecture.title} (which has no biases and "
                f"no layers but attention and experts). Give a plain {_class_name(config.model_type)}"
            )
    return expected

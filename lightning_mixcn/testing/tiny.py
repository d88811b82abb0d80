"""A mixture of some thousand parameters, with a tokenizer, in a folder like a real one's."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, PreTrainedConfig, PreTrainedTokenizerFast

from lightning_mixcn.model.architectures import architecture_named, architecture_of
from lightning_mixcn.tokenizer.begin import put_bos_first

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


# Four experts, two a token, of odd sizes: heads are not as wide as hidden / heads where the family can have it.
_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48, "head_dim": 8},
    "olmoe": {"num_experts": 4, "intermediate_size": 48, "norm_topk_prob": False},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16, "norm_topk_prob": True},
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Return sizes of the tiny model: two layers, four experts, two a token, width 32, a vocabulary of bytes.

    Args:
        family: ``mixtral``, ``olmoe`` or ``qwen3_moe``.
        changes: Settings of transformers' configuration to change.
    """
    settings: dict[str, Any] = {
        "vocab_size": 272,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        # A width of 32 needs more than the usual 0.02 for outputs, and routing, that are not all alike.
        "initializer_range": 0.1,
    }
    config: PreTrainedConfig = architecture_named(family).config(**(settings | _FAMILIES[family] | changes))
    return config


def save_tiny_model(path: str | Path, family: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random model as stock transformers does, and a tokenizer of single bytes beside it.

    The tokenizer puts BOS before a text where the family's published ones do: Mixtral's.

    Args:
        path: Folder, made if need be.
        family: As in `tiny_config`.
        seed: Seed of the random weights.
        changes: Settings of transformers' configuration to change.

    Returns:
        The folder, as `load_moe` and `load_tokenizer` take it.
    """
    folder, config = Path(path), tiny_config(family, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture_of(config).causal_lm(config)
    model.save_pretrained(folder)
    byte_tokenizer(begins_with_bos=family == "mixtral").save_pretrained(folder)
    return folder


def tiny_mixtral_config(**changes: Any) -> MixtralConfig:
    """Return `tiny_config` of a Mixtral."""
    config = tiny_config("mixtral", **changes)
    assert isinstance(config, MixtralConfig)
    return config


def save_tiny_mixtral(path: str | Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write `save_tiny_model` of a Mixtral."""
    return save_tiny_model(path, "mixtral", seed=seed, **changes)


def byte_tokenizer(*, begins_with_bos: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer of UTF-8 bytes; ids 0 to 2 are ``<unk>``, ``<s>`` and ``</s>``.

    Args:
        begins_with_bos: Let it put BOS before a text, as Mixtral's does, and Qwen's and OLMoE's do not.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL_TOKENS])
    if begins_with_bos:
        put_bos_first(tokenizer, "<s>")
    specials = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **specials
    )

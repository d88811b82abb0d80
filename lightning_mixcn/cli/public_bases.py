"""Sizes of public bases, so that a run on one can be planned where it is not, and no hub can be reached.

They are facts of each model's published ``config.json``; a test compares the parameters that they add up to with those
published. Only plans read them: a run reads the base's own file.
"""

from typing import Any

_MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}
_MIXTRAL_8X7B = _MIXTRAL | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 32768,
}
_MIXTRAL_8X22B = _MIXTRAL | {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "max_position_embeddings": 65536,
}
_OLMOE: dict[str, Any] = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "vocab_size": 50304,
    "dtype": "bfloat16",
}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "dtype": "bfloat16",
}
_QWEN3_30B = _QWEN3 | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "max_position_embeddings": 40960,
}
_QWEN3_235B = _QWEN3 | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "max_position_embeddings": 40960,
}

PUBLIC_BASES: dict[str, dict[str, Any]] = {
    "mistralai/Mixtral-8x7B-v0.1": _MIXTRAL_8X7B,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _MIXTRAL_8X7B,
    "mistralai/Mixtral-8x22B-v0.1": _MIXTRAL_8X22B,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": _MIXTRAL_8X22B | {"vocab_size": 32768},
    "allenai/OLMoE-1B-7B-0924": _OLMOE,
    "allenai/OLMoE-1B-7B-0924-Instruct": _OLMOE,
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B,
    "Qwen/Qwen3-30B-A3B-Base": _QWEN3_30B | {"max_position_embeddings": 32768},
    "Qwen/Qwen3-235B-A22B": _QWEN3_235B,
}

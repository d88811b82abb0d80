"""The structure of a model's ``config.json``: types and ranges, before a size in it is allocated or counted to.

Bounds are far above any model that was published: their purpose is that a wrong number is one line instead of a machine
without memory. Keys that no model here uses are not looked at.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_mixcn.files.schema import (
    FLAG,
    NULL,
    TEXT,
    Check,
    Fault,
    each,
    either,
    expect,
    real,
    record,
    whole,
)

_WIDTH, _LAYERS, _EXPERTS, _VOCABULARY, _POSITIONS = 2**20, 1024, 4096, 2**24, 2**31
_DTYPES = ("float64", "float32", "float16", "bfloat16")


def _or_null(check: Check) -> Check:
    return either(NULL, check)


_DTYPE = expect(
    f"one of {', '.join(_DTYPES)}",
    lambda value: isinstance(value, str) and value.removeprefix("torch.") in (*_DTYPES, "auto"),
)
_TOKEN = whole(-1, _VOCABULARY)
_TOKENS = _or_null(either(each(_TOKEN), _TOKEN))
# transformers 4 has it in `rope_scaling`, 5 in `rope_parameters`; how its numbers go together transformers checks.
_ROPE = _or_null(
    record(
        {},
        {
            "rope_type": TEXT,
            "type": TEXT,
            "rope_theta": real(1e-3, 1e12),
            "factor": real(1e-3, 1e6),
            "original_max_position_embeddings": whole(1, _POSITIONS),
        },
    )
)
_FIELDS: Mapping[str, Check] = {
    "model_type": TEXT,
    "architectures": _or_null(each(TEXT)),
    "hidden_size": whole(1, _WIDTH),
    "intermediate_size": whole(1, 2**24),
    "num_hidden_layers": whole(1, _LAYERS),
    "moe_intermediate_size": whole(1, 2**24),
    "num_local_experts": whole(1, _EXPERTS),
    "num_experts": whole(1, _EXPERTS),
    "num_experts_per_tok": whole(1, _EXPERTS),
    "vocab_size": whole(1, _VOCABULARY),
    "num_attention_heads": whole(1, 2**14),
    "num_key_value_heads": _or_null(whole(1, 2**14)),
    "head_dim": _or_null(whole(2, 2**14)),
    "rms_norm_eps": real(0, 1),
    "rope_theta": _or_null(real(1e-3, 1e12)),
    "rope_scaling": _ROPE,
    "rope_parameters": _ROPE,
    "hidden_act": TEXT,
    "max_position_embeddings": whole(1, _POSITIONS),
    "sliding_window": _or_null(whole(1, _POSITIONS)),
    "tie_word_embeddings": FLAG,
    "attention_dropout": real(0, 1),
    "attention_bias": _or_null(FLAG),
    "clip_qkv": _or_null(real(0, 1e9)),
    "norm_topk_prob": FLAG,
    "mlp_only_layers": _or_null(each(whole(0, _LAYERS))),
    "decoder_sparse_step": whole(1, _LAYERS),
    "router_aux_loss_coef": real(0, 1e3),
    "router_jitter_noise": real(0, 1),
    "output_router_logits": FLAG,
    "initializer_range": real(0, 1e3),
    "torch_dtype": _or_null(_DTYPE),
    "dtype": _or_null(_DTYPE),
    "bos_token_id": _TOKENS,
    "eos_token_id": _TOKENS,
    "pad_token_id": _TOKENS,
    "quantization_config": _or_null(record({}, {"quant_method": TEXT, "format": TEXT})),
}
_STRUCTURE = record({}, _FIELDS)


def check_config(config: Any, place: str) -> Iterator[Fault]:
    """Check the content of a ``config.json``, of whatever family; a `Check` for `read_object`."""
    faults = list(_STRUCTURE(config, place))
    yield from faults
    if faults:
        return
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        yield Fault("num_key_value_heads", f"is {groups}, expected a divisor of num_attention_heads={heads}")
    for key in ("num_local_experts", "num_experts"):
        chosen, experts = config.get("num_experts_per_tok"), config.get(key)
        if chosen and experts and chosen > experts:
            yield Fault("num_experts_per_tok", f"is {chosen}, expected at most {key}={experts}")
    quantization = config.get("quantization_config")
    if quantization is not None and not quantization.keys() & {"quant_method", "format"}:
        yield Fault("quantization_config", "names no quant_method, expected one, or null for a model in full precision")

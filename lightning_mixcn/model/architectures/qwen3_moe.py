"""Qwen3-MoE: Yang et al. 2025, https://arxiv.org/abs/2505.09388. Each head's queries and keys are normalised."""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeTopKRouter,
    load_balancing_loss_func,
)

from .record import Architecture, head_size

ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    title="Qwen3-MoE",
    config=Qwen3MoeConfig,
    causal_lm=Qwen3MoeForCausalLM,
    attention=Qwen3MoeAttention,
    router=Qwen3MoeTopKRouter,
    rotary=Qwen3MoeRotaryEmbedding,
    auxiliary_loss=load_balancing_loss_func,
    expert_width="moe_intermediate_size",
    expert_count="num_experts",
    block="mlp",
    projections={"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    normalises=lambda config: bool(config.norm_topk_prob),
    attention_norms=lambda config: {"q_norm": head_size(config), "k_norm": head_size(config)},
    # Dense layers among the mixtures, and shared experts, which only its relatives have.
    accepted={
        "attention_bias": (None, False),
        "mlp_only_layers": (None, []),
        "decoder_sparse_step": (None, 1),
        "shared_expert_intermediate_size": (None, 0),
    },
    dense=("qwen3",),
    upcycled={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    gguf_pairs=False,
    llama_cpp={"norm_topk_prob": True, "use_sliding_window": False},  # src/models/qwen3moe.cpp
)

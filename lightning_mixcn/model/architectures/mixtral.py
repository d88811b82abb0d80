"""Mixtral: Jiang et al. 2024, https://arxiv.org/abs/2401.04088."""

from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralRotaryEmbedding,
    MixtralTopKRouter,
    load_balancing_loss_func,
)

from .record import Architecture

ARCHITECTURE = Architecture(
    model_type="mixtral",
    title="Mixtral",
    config=MixtralConfig,
    causal_lm=MixtralForCausalLM,
    attention=MixtralAttention,
    router=MixtralTopKRouter,
    rotary=MixtralRotaryEmbedding,
    auxiliary_loss=load_balancing_loss_func,
    expert_width="intermediate_size",
    expert_count="num_local_experts",
    block="block_sparse_moe",
    projections={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    normalises=lambda config: True,
    attention_norms=lambda config: {},
    accepted={},
    dense=("llama", "mistral"),
    upcycled={},
    gguf_pairs=True,
    llama_cpp={},
)

"""OLMoE: Muennighoff et al. 2024, https://arxiv.org/abs/2409.02060. Queries and keys are normalised over all heads."""

from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeAttention,
    OlmoeRotaryEmbedding,
    OlmoeTopKRouter,
    load_balancing_loss_func,
)

from .record import Architecture

ARCHITECTURE = Architecture(
    model_type="olmoe",
    title="OLMoE",
    config=OlmoeConfig,
    causal_lm=OlmoeForCausalLM,
    attention=OlmoeAttention,
    router=OlmoeTopKRouter,
    rotary=OlmoeRotaryEmbedding,
    auxiliary_loss=load_balancing_loss_func,
    expert_width="intermediate_size",
    expert_count="num_experts",
    block="mlp",
    projections={"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    normalises=lambda config: bool(config.norm_topk_prob),
    attention_norms=lambda config: {
        "q_norm": config.hidden_size,
        "k_norm": config.hidden_size // config.num_attention_heads * config.num_key_value_heads,
    },
    accepted={"attention_bias": (None, False)},
    dense=(),
    upcycled={},
    gguf_pairs=False,
    # convert_hf_to_gguf.py's OlmoeModel writes the epsilon, src/models/olmoe.cpp has the rest.
    llama_cpp={"norm_topk_prob": False, "clip_qkv": None, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
)

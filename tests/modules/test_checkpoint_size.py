"""What a run of Mixtral-8x7B writes, from the sizes alone."""

from typing import Any

import torch
from peft import LoraConfig
from transformers import MixtralConfig

from lightning_mixcn import build_mixtral
from lightning_mixcn.modules import PretrainModule

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]


def test_no_base_weight_is_in_a_checkpoint_of_mixtral_8x7b() -> None:
    module = PretrainModule("base", lora=LoraConfig(r=64, target_modules=TARGETS), train_embeddings=True)
    module.model = build_mixtral(MixtralConfig(), lora=module.lora, train_embeddings=True, device="meta")
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 1_231_044_608
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    state, moments = module.state_dict(), optimizer.state_dict()["state"]
    assert all("lora_" in name or "embed_tokens" in name or "lm_head" in name for name in state)
    written = _bytes(state) + sum(_bytes(of_parameter) for of_parameter in moments.values())
    assert written < 1.1 * 3 * sum(parameter.nbytes for parameter in trained)


def _bytes(tensors: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values() if isinstance(tensor, torch.Tensor))

"""The tiny model is what its folder's readers take it for."""

from pathlib import Path
from typing import Any

import torch
import transformers

from lightning_mixcn.testing import save_tiny_mixtral
from lightning_mixcn.text import load_tokenizer


def test_stock_transformers_loads_it(tiny_base: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_base)
    assert model.config.model_type == "mixtral"
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000


def test_the_seed_decides(tmp_path: Path, tiny_base: Path) -> None:
    state = torch.get_rng_state()
    same, other = (save_tiny_mixtral(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tiny_base, same, other)]
    assert weights[0] == weights[1] != weights[2]


def test_sizes_can_be_changed(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(save_tiny_mixtral(tmp_path, num_local_experts=2, hidden_size=16))
    assert (config.num_local_experts, config.hidden_size) == (2, 16)


def test_every_byte_is_a_token(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    text = "a 中\n  <s>"
    (ids,) = tokenizer.encode_batch([text])
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 259)

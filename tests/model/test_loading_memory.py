"""Host memory while a checkpoint of Mixtral-8x7B's width is loaded; a fresh process, so that its peak is its own."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import MixtralConfig

from lightning_mixcn.model import load_mixtral, local_bytes, shard_model
from lightning_mixcn.model.checkpoints.writer import new_checkpoint
from lightning_mixcn.testing import run_distributed

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip

MEASURE = """
import json, sys
from lightning_mixcn.model import bytes_in_memory, load_mixtral, planned_quantised_bytes
from lightning_mixcn.commands.process import peak_resident_bytes
before = peak_resident_bytes()
model = load_mixtral(sys.argv[1])
peak = peak_resident_bytes()
figures = bytes_in_memory(model) | {"peak": peak - before, "planned": planned_quantised_bytes(model.config)}
print(json.dumps(figures))
"""


def write_random_checkpoint(folder: Path) -> None:
    """5.8 GB of safetensors, made a matrix at a time; one random matrix serves all experts."""
    config = MixtralConfig(**CONFIG)
    hidden, intermediate, key_value = config.hidden_size, config.intermediate_size, 1024
    noise = torch.randn(intermediate * hidden, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return noise[: rows * columns].view(rows, columns)

    with new_checkpoint(folder, CONFIG) as writer:
        writer.add("model.embed_tokens.weight", matrix(config.vocab_size // 4, hidden).repeat(4, 1))
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            for name, rows in (("q_proj", hidden), ("k_proj", key_value), ("v_proj", key_value), ("o_proj", hidden)):
                writer.add(f"{prefix}.self_attn.{name}.weight", matrix(rows, hidden))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"{prefix}.{norm}.weight", torch.ones(hidden, dtype=torch.bfloat16))
            writer.add(f"{prefix}.block_sparse_moe.gate.weight", matrix(8, hidden))
            for expert in range(config.num_local_experts):
                experts = f"{prefix}.block_sparse_moe.experts.{expert}"
                writer.add(f"{experts}.w1.weight", matrix(intermediate, hidden))
                writer.add(f"{experts}.w2.weight", matrix(hidden, intermediate))
                writer.add(f"{experts}.w3.weight", matrix(intermediate, hidden))
        writer.add("model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16))
        writer.add("lm_head.weight", matrix(config.vocab_size // 4, hidden).repeat(4, 1))


def loaded_share(base: str) -> tuple[int, int]:
    """Bytes that a rank's memory grew by at its peak, and bytes of parameters that it holds."""
    before = peak_memory()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = load_mixtral(base, shard=partial(shard_model, mesh=mesh))
    assert isinstance(model, torch.nn.Module)
    return peak_memory() - before, local_bytes(model)


def peak_memory() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_peak_is_the_four_bit_model_and_one_and_a_half_gigabytes(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "base")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "base")], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["peak"] <= figures["quantised"] + figures["dense"] + 1.5e9
    assert abs(figures["quantised"] / figures["planned"] - 1) < 0.02
    for peak, held in run_distributed(loaded_share, 2, str(tmp_path / "base"), timeout_seconds=900.0):
        assert held == pytest.approx((figures["quantised"] + figures["dense"]) / 2, rel=0.03)
        assert peak <= held + 1e9

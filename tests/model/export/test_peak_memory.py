"""Host memory while a model of Mixtral-8x7B's width is merged; a fresh process, so that its peak is its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file

from lightning_mixcn.testing import byte_tokenizer, save_tiny_mixtral
from tests.model.test_loading_memory import write_random_checkpoint

# The kernel's own figures of this process: `getrusage` would count the parent's memory, too, from before `exec`.
MEASURE = """
import json, re, sys
from pathlib import Path
import lightning_mixcn.model.export.folder  # torch and what else `export` imports is no part of its peak
from lightning_mixcn.model.export.command import export
def figure(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = figure("VmRSS")
export(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
print(figure("VmHWM") - before)
"""


def write_adapter(base: Path, folder: Path, layers: int, experts: int, hidden: int, intermediate: int) -> None:
    """Rank 16 on all experts, bf16; one pair of factors serves all of them."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(layers):
        for expert in range(experts):
            for name in ("w1", "w2", "w3"):
                out, into = (hidden, intermediate) if name == "w2" else (intermediate, hidden)
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(16, into, generator=generator).mul_(0.01).bfloat16()
                tensors[f"{key}.lora_B.weight"] = torch.randn(out, 16, generator=generator).mul_(0.01).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = peft.LoraConfig(r=16, target_modules=["w1", "w2", "w3"], base_model_name_or_path=str(base))
    config.save_pretrained(str(folder))


def peak(adapter: Path, out: Path, **options: object) -> int:
    command = [sys.executable, "-c", MEASURE, str(adapter), str(out), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def test_peak_of_a_small_model(tmp_path: Path) -> None:
    """150 MB of weights in shards of 10 MB: 38 MB at its peak, of which a matrix in float32 has 3."""
    base = save_tiny_mixtral(tmp_path / "base", hidden_size=512, intermediate_size=1536, num_local_experts=8)
    write_adapter(base, tmp_path / "adapter", 2, 8, 512, 1536)
    weights = (base / "model.safetensors").stat().st_size
    assert weights > 150e6
    assert peak(tmp_path / "adapter", tmp_path / "out", max_shard_bytes=10_000_000) < 80e6
    instruct = save_tiny_mixtral(
        tmp_path / "instruct", seed=1, hidden_size=512, intermediate_size=1536, num_local_experts=8
    )
    options = {"max_shard_bytes": 10_000_000, "instruct_delta": str(instruct)}
    assert peak(tmp_path / "adapter", tmp_path / "added", **options) < 80e6


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("base", ["original", "dequantised"])
def test_peak_is_one_shard_and_two_gigabytes(tmp_path: Path, base: str) -> None:
    write_random_checkpoint(tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", 2, 8, 4096, 14336)
    assert peak(tmp_path / "adapter", tmp_path / "out", base=base) <= 1e9 + 2e9


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_peak_with_an_instruct_delta_is_three_tensors_and_half_a_gigabyte(tmp_path: Path, layout: str) -> None:
    base, instruct = tmp_path / "base", tmp_path / "instruct"
    write_random_checkpoint(base)
    write_adapter(base, tmp_path / "adapter", 2, 8, 4096, 14336)
    # The same numbers under another configuration: a base of its own, for which the disk need not hold them twice.
    instruct.mkdir()
    for file in base.iterdir():
        os.link(file, instruct / file.name)
    config = json.loads((base / "config.json").read_text()) | {"eos_token_id": 7}
    (instruct / "config.json").unlink()
    (instruct / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(instruct)
    largest = 2 * (32000 * 4096 if layout == "per-expert" else 8 * 2 * 14336 * 4096)
    found = peak(tmp_path / "adapter", tmp_path / "out", instruct_delta=str(instruct), layout=layout)
    assert found <= 3 * largest + 0.5e9

"""Two nodes, as two agents of torchrun on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

CONFIG = """
model:
  class_path: PretrainModule
  init_args:
    base: {base}
    dtype: float32
    lora: {{r: 4, target_modules: [q_proj, gate, w1, w2, w3]}}
data:
  class_path: PretrainDataModule
  init_args:
    sources: [{{name: zh, path: {text}}}]
    sequence_length: 48
    micro_batch_size: 1
    num_streams: 8
    num_workers: 0
    val_fraction: 0.0
trainer:
  accelerator: cpu
  devices: 1
  num_nodes: 2
  strategy: fsdp2
  max_steps: 3
  default_root_dir: {out}
  enable_progress_bar: false
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_two_nodes_train_one_model(tmp_path: Path, tiny_base: Path) -> None:
    text, out = tmp_path / "text.jsonl", tmp_path / "run"
    text.write_text("\n".join(json.dumps({"text": f"{n} " * (n % 13)}) for n in range(300)), encoding="utf-8")
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(base=tiny_base, text=text, out=out), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=mixcn"]
    fit = ["-m", "lightning_mixcn", "fit", "--config", str(config)]
    agents = [
        subprocess.Popen(
            [*command, *rendezvous, *fit], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for agent in agents:
        _, error = agent.communicate(timeout=240)
        assert agent.returncode == 0, error
    shares = sorted(path.name for path in (out / "checkpoints" / "step=00000003.ckpt").glob("*.distcp"))
    assert shares == ["__0_0.distcp", "__1_0.distcp"]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()

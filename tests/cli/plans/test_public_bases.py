"""Sizes of public bases, against the published numbers of parameters, and plans made of them without a hub."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_mixcn.cli import main
from lightning_mixcn.cli.public_bases import PUBLIC_BASES

# As the hub shows them for each model's safetensors.
PARAMETERS = {
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
}


@pytest.mark.parametrize("base", PARAMETERS)
def test_sizes_add_up_in_stock_transformers(base: str) -> None:
    settings = dict(PUBLIC_BASES[base])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[base]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_known_hub_id_is_planned_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    Path("zh.jsonl").write_text('{"text": "今年春节期间,许多人回到家乡。"}\n' * 60, encoding="utf-8")
    given = ["--base", "allenai/OLMoE-1B-7B-0924", "--text", "zh=zh.jsonl"]
    assert main(["init", *given, "--gpu", "h100-80gb", "--out", "run.yaml"]) == 0
    assert "olmoe, context 4,096 tokens" in capsys.readouterr().out
    assert yaml.safe_load(Path("run.yaml").read_text(encoding="utf-8"))["model"]["init_args"]["base"] == given[1]
    assert main(["fit", "--config", "run.yaml", "--plan", "--card", "h100-80gb"]) == 0
    assert "The largest micro-batch is" in capsys.readouterr().out


def test_an_unknown_hub_id_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("zh.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    given = ["--base", "mistralai/Mixtral-8x7B-v0.2", "--text", "zh=zh.jsonl"]
    assert main(["init", *given, "--gpu", "80gb", "--out", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert "'mistralai/Mixtral-8x7B-v0.2' is not a folder, and not in the local hub cache" in error
    assert "did you mean 'mistralai/Mixtral-8x7B-v0.1'" in error
    assert error.count("\n") == 1

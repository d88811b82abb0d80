"""The whole way on a tiny model: pre-training, instruction tuning on its adapter, chat, export, as a user types it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from lightning_mixcn.cli import main
from lightning_mixcn.testing import save_tiny_model

CONFIG = """
model:
  class_path: PretrainModule
  init_args:
    dtype: float32
    lora: {r: 4, lora_alpha: 8, target_modules: all-linear}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
data:
  class_path: PretrainDataModule
  init_args:
    sources: [{name: zh, path: zh.jsonl}]
    sequence_length: 64
    micro_batch_size: 2
    num_streams: 2
    num_workers: 0
    val_fraction: 0.2
trainer:
  accelerator: cpu
  max_steps: 3
  val_check_interval: 3
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture
def pretraining(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    Path("zh.jsonl").write_text("".join(json.dumps({"text": f"今天{n}"}) + "\n" for n in range(40)), encoding="utf-8")
    records = [{"instruction": f"问{number}", "output": "答。" * (1 + number % 3)} for number in range(40)]
    Path("sft.json").write_text(json.dumps(records), encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(CONFIG)
    config["model"]["init_args"]["base"] = str(tiny_base)
    return config


def tuning_of(config: dict[str, Any], **model: Any) -> dict[str, Any]:
    """Run the same on instructions."""
    tuning: dict[str, Any] = yaml.safe_load(yaml.safe_dump(config))
    tuning["model"]["class_path"], tuning["data"]["class_path"] = "InstructModule", "InstructDataModule"
    tuning["model"]["init_args"] |= model
    tuning["data"]["init_args"]["sources"][0]["path"] = "sft.json"
    tuning["trainer"]["callbacks"] = [
        {"class_path": "SampleAnswers", "init_args": {"questions": 2, "max_new_tokens": 4}}
    ]
    return tuning


def run(name: str, config: dict[str, Any], command: str = "fit", *options: str) -> int:
    Path(f"{name}.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return main([command, "--config", f"{name}.yaml", *options])


def test_the_adapter_goes_on(pretraining: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pretrain", pretraining) == 0
    tuning = tuning_of(pretraining, adapter="runs/pretrain", loss_weighting="conversation")
    assert run("tune", tuning) == 0
    folder = Path("runs/tune")
    assert {"adapter", "adapter_best", "answers.jsonl", "checkpoints", "config.yaml"} <= {
        p.name for p in folder.iterdir()
    }
    # The start of the tuning is the end of the pre-training.
    for name, adapter in (("before", "runs/pretrain"), ("after", "runs/tune")):
        untrained = tuning_of(pretraining, adapter=adapter)
        untrained["trainer"]["callbacks"] = None
        assert run(name, untrained, "validate") == 0
    before, after = (
        json.loads(Path(f"runs/{name}/validate.json").read_text(encoding="utf-8"))["sources"]["zh"]
        for name in ("before", "after")
    )
    assert after["nll_nats_per_token"] < before["nll_nats_per_token"]
    # Answers only: each character has three bytes, each byte is a token, and each answer has an EOS.
    assert before["tokens"] - before["bytes"] > 0
    assert before["bytes"] % 3 == 0
    assert run("tune", tuning, "fit", "--ckpt_path", "last", "--trainer.max_steps", "4") == 0
    assert "step=00000004.ckpt" in str((folder / "checkpoints" / "last.ckpt").resolve())
    capsys.readouterr()


def test_a_new_adapter_on_the_merged_one_and_out_into_the_world(
    pretraining: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pretrain", pretraining) == 0
    assert main(["export", "runs/pretrain", "merged"]) == 0
    assert run("tune", tuning_of(pretraining, base="merged")) == 0
    assert main(["export", "runs/tune", "tuned"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained("tuned")
    assert torch.isfinite(model(torch.tensor([[1, 5, 6]])).logits).all()
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("问1\n"))
    assert main(["chat", "runs/tune", "--max_new_tokens", "3", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out


# A template of the model's own, as Qwen3's and OLMoE's folders have one.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("family", "in_four_bits"),
    [
        ("olmoe", False), ("qwen3_moe", True),
        pytest.param("olmoe", True, marks=pytest.mark.slow), pytest.param("qwen3_moe", False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_every_family_goes_the_whole_way(
    family: str,
    in_four_bits: bool,
    pretraining: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_tiny_model("base", family)
    tokenizer = json.loads(Path("base/tokenizer_config.json").read_text(encoding="utf-8"))
    Path("base/tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": TEMPLATE}))
    if in_four_bits:
        assert main(["quantize", "base", "base4", "--dtype", "float32"]) == 0
    pretraining["model"]["init_args"] |= {
        "base": "base4" if in_four_bits else "base",
        "activation_checkpointing": "full",
        "train_embeddings": in_four_bits,
    }
    pretraining["model"]["init_args"]["lora"] |= {"lora_dropout": 0.1, "use_rslora": True}
    assert run("whole", pretraining) == 0
    tuning = tuning_of(pretraining, adapter="runs/whole")
    tuning["data"]["init_args"]["template"] = "tokenizer"
    assert run("tune", tuning) == 0
    assert main(["export", "runs/tune", "merged", "--original", "base"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert model.config.model_type == family
    assert torch.isfinite(model(torch.tensor([[1, 5, 6]])).logits).all()
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("问1\n"))
    assert main(["chat", "runs/tune", "--max_new_tokens", "3", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out
    assert run("tune", tuning, "fit", "--plan") == 0
    assert "tokens/s" in capsys.readouterr().out

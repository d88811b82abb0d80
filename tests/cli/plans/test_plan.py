"""``mixcn fit … --plan`` on a tiny base, and a plan beside the run that was planned."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from lightning_mixcn.cli import main
from lightning_mixcn.cli.plan import Ranks
from lightning_mixcn.metrics.device import CARDS, stated_peak
from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.memory.optimizer import MemoryTracker
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch, save_tiny_mixtral

CONFIG = """
model:
  class_path: PretrainModule
  init_args:
    lora: {r: 4, target_modules: all-linear}
data:
  class_path: PretrainDataModule
  init_args:
    sources: [{name: zh, path: zh.jsonl}]
    sequence_length: 512
    micro_batch_size: 2
trainer: {accelerator: cpu, max_steps: 4}
"""
OVERLAYS = Path(__file__).parents[3] / "configs/trainer"


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    content: dict[str, Any] = yaml.safe_load(CONFIG)
    content["model"]["init_args"]["base"] = str(tiny_base)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_plan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(config.parent.iterdir())
    assert main(["fit", "--config", str(config), "--plan"]) == 0
    text = capsys.readouterr().out
    assert "One of 1 rank on cpu, micro-batches of 2 x 512 tokens, activations: selective in 2 layers" in text
    for line in ("base in 4 bits", "trained, float32", "optimizer states (AdamW)", "activations kept for backward"):
        assert line in text
    assert re.search(r"the run fits \(\+[\d.]+ GB\). The largest micro-batch is \d+ rows of 512 tokens", text)
    assert re.search(r"The limit is [\d,]+ tokens/s on a rank", text)
    assert sorted(config.parent.iterdir()) == before


def test_it_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    assert "--plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overlay", "options"),
    [("fsdp2", ["--trainer.devices=8"]), ("hsdp", ["--trainer.devices=4", "--trainer.num_nodes=2"])],
)
def test_overlays(overlay: str, options: list[str], config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--config", str(config), "--config", str(OVERLAYS / f"{overlay}.yaml"), *options, "--plan"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "One of 8 ranks on cuda" in text
    assert "gathered from other ranks" in text
    if not torch.cuda.is_available():
        assert "There is no GPU here" in text


def test_a_card_that_is_not_here(config: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that is there of the base is its configuration; `accelerator: cpu` of the file is not the card's."""
    alone = config.parent / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    options = ["--config", str(config), f"--model.base={alone}", "--model.activation_memory=auto"]
    assert main(["fit", *options, "--plan", "--card=h100-80gb"]) == 0
    text = capsys.readouterr().out
    assert "One of 1 rank on h100-80gb, micro-batches of 2 x 512 tokens" in text
    assert "A rank can have 80.00 GB, of which 8% stay in reserve: the run fits" in text
    assert "989.40 TFLOP/s (stated by its maker)" in text
    assert "3350.0 GB/s (stated by its maker)" in text
    options += ["--model.dtype=float32", "--trainer.devices=2", "--trainer.strategy=fsdp"]
    assert main(["fit", *options, "--plan", "--card=a10-24gb"]) == 0
    text = capsys.readouterr().out
    assert "One of 2 ranks on a10-24gb" in text
    assert "How fast it is in float32 is not known" in text


def test_an_adapter_is_planned_as_it_is(
    config: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig

    adapter = tmp_path / "adapter"
    load_mixtral(tiny_base, lora=LoraConfig(r=4, target_modules="all-linear")).save_pretrained(str(adapter))
    plans = []
    for options in ([], ["--model.lora=null", f"--model.adapter={adapter}"]):
        assert main(["fit", "--config", str(config), "--plan", "--card=l4-24gb", *options]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]


def test_every_card_has_a_rate() -> None:
    for name, card in CARDS.items():
        assert stated_peak(f"NVIDIA {card.name}") is not None
        assert name.endswith(f"-{card.bytes // 10**9}gb")


def test_a_card_is_for_a_plan_and_known(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(config), "--card=h100-80gb"]) == 2
    assert "`--card h100-80gb` is what a plan is made for. Add `--plan`" in capsys.readouterr().err
    assert main(["fit", "--config", str(config), "--plan", "--card=h100-80"]) == 2
    assert "`--card h100-80` is not known (did you mean 'h100-80gb'?). Give one of b200" in capsys.readouterr().err


def test_a_budget(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(config), "--plan", "--model.init_args.activation_memory=auto"]) == 0
    assert "activations: selective in 2 layers" in capsys.readouterr().out


def test_weights_by_progress_are_planned(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = "--data.init_args.sources=[{name: zh, path: zh.jsonl, weight: {0.0: 1, 1.0: 0.5}}]"
    arguments = ["fit", "--config", str(config), "--plan", sources]
    assert main([*arguments, "--trainer.accumulate_grad_batches=3"]) == 0
    assert "Weights of sources by progress are fractions of 24 rows." in capsys.readouterr().out
    assert main([*arguments, "--trainer.max_steps=-1"]) == 2
    assert "`trainer.max_steps=-1`: a `weight` of `sources` is by fraction" in capsys.readouterr().err


def test_bad_input_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(config), "--plan", "--model.init_args.base=nowhere"]) == 2
    assert "'nowhere' is not there" in capsys.readouterr().err
    assert main(["fit", "--config", str(config), "--plan", "--model.init_args.activation_memory=10"]) == 2
    assert "`activation_memory=10`: even with all layers but one" in capsys.readouterr().err


@pytest.mark.parametrize(("devices", "count"), [("auto", 1), (3, 3), ("2", 2), ("0,1", 2), ("1,", 1), ([0, 2], 2)])
def test_devices(devices: Any, count: int) -> None:
    settings = type("Settings", (), {"accelerator": "cpu", "devices": devices, "num_nodes": 2})
    assert Ranks.of(settings) == Ranks("cpu", count, 2)


class Watch(Callback):
    """Living bytes of a fit from its first batch on."""

    def __init__(self) -> None:
        self.live = MemoryTracker()

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.live.__enter__()

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.live.__exit__(None, None, None)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_fit_is_as_large_as_planned(mode: Any, tmp_path: Path) -> None:
    """Small, but wide: 2 x 512 tokens."""
    from peft import LoraConfig

    from lightning_mixcn.cli.plan import RunPlan

    sizes = {"hidden_size": 128, "intermediate_size": 448, "head_dim": 32, "max_position_embeddings": 1024}
    base = save_tiny_mixtral(tmp_path / "base", **sizes)
    lora = LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.05)
    module = PretrainModule(str(base), lora=lora, activation_checkpointing=mode)
    data = FixedBatches([random_batch([512, 512], 512, seed=seed) for seed in range(3)])
    data.micro_batch_size, data.sequence_length, data.packing = 2, 512, "concatenate"  # type: ignore[attr-defined]  # as stream modules have them
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        callbacks=[watch],
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **quiet,
    )
    settings = type(
        "Settings",
        (),
        {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "accumulate_grad_batches": 1},
    )
    plan = RunPlan(settings, module, data).memory
    trainer.fit(module, data)
    assert plan.peak - plan.quantised - plan.dense - plan.trained == pytest.approx(watch.live.peak, rel=0.05)

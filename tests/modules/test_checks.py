"""Moments in 8 bits by bitsandbytes: how near to torch's AdamW, resumed exactly, refused where they cannot be."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.torch_version import TorchVersion

from lightning_mixcn.callbacks import StepCheckpoint, TrainabilityCheck
from lightning_mixcn.cli import main
from lightning_mixcn.modules import FSDP2Strategy, PretrainModule
from lightning_mixcn.modules.checks import check_optimizer
from lightning_mixcn.modules.strategies import check_strategy
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed

Make = Callable[..., Any]
# The tiny model's parameters are below the 4,096 elements from which bitsandbytes takes 8 bits.
EIGHT_BIT: Any = partial(AdamW8bit, lr=3e-3, weight_decay=0.01, min_8bit_size=1)
MOMENTS = ("state1", "state2", "absmax1", "absmax2")


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/nll_nats_per_token"]))


def settings(lora: Make) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "lora": lora(r=16, lora_alpha=32),
        "train_embeddings": True,
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    }


def test_the_loss_stays_near_that_of_adamw(tiny_base: Path, lora: Make, trainer: Make) -> None:
    """Within 4 % at each of 30 steps, in which it falls to a third; moments take a quarter of the bytes."""
    curves, moment_bytes = [], []
    for optimizer in (partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01), EIGHT_BIT):
        watch = Losses()
        module = PretrainModule(str(tiny_base), optimizer=optimizer, **settings(lora))
        run = trainer(max_steps=30, max_epochs=-1, gradient_clip_val=1.0, callbacks=[watch, TrainabilityCheck()])
        run.fit(module, FixedBatches([random_batch([24, 20])]))
        curves.append(watch.losses)
        kept = ("exp_avg", "exp_avg_sq", *MOMENTS)
        states = run.optimizers[0].state.values()
        moment_bytes.append(sum(state[name].nbytes for state in states for name in kept if name in state))
    exact, rounded = curves
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.04)
    assert exact[-1] < exact[0] / 3
    # Two bytes instead of eight, and a float32 scale for each 256; smaller tensors have a whole scale, too.
    assert moment_bytes[1] < 0.26 * moment_bytes[0]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # it is resumed from there
def test_a_resumed_run_goes_on_exactly(tiny_base: Path, lora: Make, trainer: Make, tmp_path: Path) -> None:
    """Lightning loads with ``weights_only=True``, see `check_before_loading`."""
    ends = []
    for name, stops in (("whole", [6]), ("cut", [3, 6])):
        for stop in stops:
            module = PretrainModule(str(tiny_base), optimizer=EIGHT_BIT, **settings(lora))
            saving = StepCheckpoint(every_n_steps=3, dirpath=str(tmp_path / name))
            run = trainer(
                max_steps=stop, max_epochs=-1, gradient_clip_val=1.0, enable_checkpointing=True, callbacks=[saving]
            )
            resumed = str(tmp_path / name / "last.ckpt") if stop != stops[0] else None
            run.fit(module, FixedBatches([random_batch([24, 20])]), ckpt_path=resumed)
        moments = [state[key] for state in run.optimizers[0].state.values() for key in MOMENTS]
        ends.append([*module.state_dict().values(), *moments])
        assert {moment.dtype for moment in moments} == {torch.uint8, torch.float32}
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_from_yaml(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The overlay that is shipped, over a small run."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("Every document is a text of some length. " * 200, encoding="utf-8")
    run = tmp_path / "run.yaml"
    run.write_text(
        f"""
model:
  class_path: PretrainModule
  init_args:
    base: {tiny_base}
    dtype: float32
    lora: {{r: 32, target_modules: [w1, w2, w3]}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-3, fused: true}}}}
data:
  class_path: PretrainDataModule
  init_args:
    sources: [{{name: en, path: {text}}}]
    sequence_length: 32
    micro_batch_size: 1
    num_streams: 4
    num_workers: 0
    val_fraction: 0.0
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 0
  default_root_dir: {tmp_path / "out"}
""",
        encoding="utf-8",
    )
    overlay = Path(__file__).parents[2] / "configs/model/adamw8bit.yaml"
    assert main(["fit", "--config", str(run), "--config", str(overlay)]) == 0
    checkpoint = torch.load(tmp_path / "out/checkpoints/last.ckpt", weights_only=True)
    (optimizer,) = checkpoint["optimizer_states"]
    assert optimizer["param_groups"][0]["weight_decay"] == 0.1
    kept = [
        tensor for state in optimizer["state"].values() for tensor in state["__bnb_optimizer_quant_state__"].values()
    ]
    assert torch.uint8 in {tensor.dtype for tensor in kept}


def test_paged_states_on_the_cpu_are_plain_ones(tiny_base: Path, lora: Make, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), optimizer=partial(PagedAdamW8bit, lr=3e-3), **settings(lora))
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        trainer(max_steps=1).fit(module, FixedBatches([random_batch([9])]))


@pytest.mark.parametrize("strategy", [FSDP2Strategy, ModelParallelStrategy])
@pytest.mark.parametrize("optimizer", [AdamW8bit, PagedAdamW8bit])
def test_sharded_parameters_are_refused(strategy: Any, optimizer: Any) -> None:
    parameters = [nn.Parameter(torch.zeros(4))]
    with pytest.raises(
        ValueError, match=rf"{optimizer.__name__} cannot hold.*{strategy.__name__} shards. Use torch.opt"
    ):
        check_optimizer(optimizer(parameters), strategy())
    check_optimizer(torch.optim.AdamW(parameters), strategy())
    for whole in (DDPStrategy(), SingleDeviceStrategy()):
        check_optimizer(optimizer(parameters), whole)


@pytest.mark.parametrize("strategy", [FSDPStrategy(), "fsdp_cpu_offload"])
def test_fsdp1_is_refused(strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"is FSDP1, which is not supported any more. Set `trainer.strategy: fsdp`"):
        check_strategy(strategy)
    for kept in ("auto", "ddp", "fsdp", "fsdp2", "hsdp", FSDP2Strategy(), DDPStrategy()):
        check_strategy(kept)


def test_a_misspelt_strategy_is_known_before_a_device_is() -> None:
    with pytest.raises(
        ValueError, match=r"`trainer.strategy='fsdp3'` is no strategy \(did you mean 'fsdp2?'\?\); `mixcn"
    ):
        check_strategy("fsdp3")


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2", "hsdp", FSDP2Strategy(), ModelParallelStrategy()])
def test_fsdp2_needs_a_torch_that_shards_whole_numbers(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    with pytest.raises(ValueError, match=r"needs torch 2.12 or newer, here is 2.11.0\+cu130.*strategy: ddp"):
        check_strategy(strategy)
    for kept in ("auto", "ddp", DDPStrategy()):
        check_strategy(kept)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.0"))
    check_strategy(strategy)


def test_fsdp1_is_refused_on_the_command_line(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--model", "PretrainModule", "--model.base", str(tiny_base), "--data", "PretrainDataModule"]
    arguments += ["--data.sources", "[{name: zh, path: nowhere.jsonl}]", "--trainer.accelerator=cpu"]
    assert main([*arguments, "--trainer.strategy={class_path: lightning.pytorch.strategies.FSDPStrategy}"]) == 2
    assert "FSDPStrategy is FSDP1, which is not supported any more" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fsdp2_is_refused_before_anything_trains(tiny_base: Path, tmp_path: Path) -> None:
    from tests.modules import strategy_run

    with pytest.raises(RuntimeError, match="AdamW8bit cannot hold states of parameters that FSDP2Strategy shards"):
        run_distributed(partial(strategy_run.train, optimizer=EIGHT_BIT), 2, ["fsdp2"], str(tiny_base), str(tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [AdamW8bit, PagedAdamW8bit])
def test_on_a_gpu(optimizer: Any, tiny_base: Path, lora: Make, trainer: Make, tmp_path: Path) -> None:
    """As near to AdamW as on the CPU; a checkpoint of it is read again."""
    curves: list[list[float]] = []
    for make in (partial(torch.optim.AdamW, lr=3e-3), partial(optimizer, lr=3e-3, min_8bit_size=1)):
        watch, saving = Losses(), StepCheckpoint(every_n_steps=40, dirpath=str(tmp_path / str(len(curves))))
        module = PretrainModule(str(tiny_base), optimizer=make, **settings(lora))
        run = {"accelerator": "gpu", "devices": 1, "max_epochs": -1, "enable_checkpointing": True}
        trainer(max_steps=40, callbacks=[watch, saving], **run).fit(module, FixedBatches([random_batch([24, 20])]))
        curves.append(watch.losses)
    assert curves[1] == pytest.approx(curves[0], rel=0.04)
    module = PretrainModule(str(tiny_base), optimizer=make, **settings(lora))
    resumed = trainer(max_steps=41, callbacks=[watch, saving], **run)
    resumed.fit(module, FixedBatches([random_batch([24, 20])]), ckpt_path=str(tmp_path / "1/last.ckpt"))
    assert watch.losses[-1] == pytest.approx(curves[1][39], rel=0.05)

"""Values of the Trainer, optimizer, schedule, LoRA and callbacks in a configuration: a run, or one line."""

import inspect
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

from lightning_mixcn import PretrainModule
from lightning_mixcn.cli import main
from lightning_mixcn.cli.trainer import MixcnCLI, try_optimization

CONFIG: dict[str, Any] = {
    "model": {
        "class_path": "PretrainModule",
        "init_args": {
            "base": "base",
            "tokenizer": "tokenizer",
            "lora": {"r": 4},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
            "lr_scheduler": {"class_path": "WarmupCosine", "init_args": {}},
        },
    },
    "data": {"class_path": "PretrainDataModule", "init_args": {"sources": [{"name": "zh", "path": "zh.jsonl"}]}},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2, "logger": False},
}
WRONG: list[Any] = [None, "", "abc", -1, 0, 1.5, 1e308, 10**21, math.nan, [], {}, True]
_INIT = ("model", "init_args")
CASES = [
    pytest.param(place, name, value, id=f"{'.'.join((*place, name))}-{value!r:.12}")
    for place, names in (
        (("trainer",), tuple(inspect.signature(Trainer.__init__).parameters)[1:]),
        ((), ("seed_everything", "ckpt_path", "weights_only", "plan", "data", "model", "trainer")),
        ((*_INIT, "optimizer", "init_args"), ("lr", "betas", "eps", "weight_decay", "fused", "foreach", "maximize")),
        ((*_INIT, "lr_scheduler", "init_args"), ("warmup_fraction", "final_fraction", "total_steps")),
        ((*_INIT, "lora"), ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "loftq_config")),
    )
    for name in names
    for value in WRONG
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder where a command ends once everything is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(MixcnCLI, "_run_subcommand", lambda self, command: None)
    monkeypatch.setattr("lightning_mixcn.cli.trainer.fetch_tokenizer", lambda settings: None)
    return tmp_path


def check(place: tuple[str, ...], name: str, value: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config: dict[str, Any] = yaml.safe_load(yaml.safe_dump(CONFIG))
    inner = config
    for key in place:
        inner = inner[key]
    inner[name] = value
    (folder / "x.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    code = main(["fit", "--config", "x.yaml"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixcn: error: ")]
    assert (code, len(errors)) in ((0, 0), (2, 1))
    if isinstance(value, float) and not 0 <= value < 1e16:
        assert code == 2, "not a number of this project"


@pytest.mark.filterwarnings("ignore")  # of Lightning, about what it makes of a value
@pytest.mark.parametrize(("place", "name", "value"), CASES[::79])
def test_a_wrong_value_is_one_line(
    place: tuple[str, ...], name: str, value: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(place, name, value, folder, capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("place", "name", "value"), CASES)
def test_every_wrong_value_is_one_line(
    place: tuple[str, ...], name: str, value: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(place, name, value, folder, capsys)


class TwoGroups(PretrainModule):
    def configure_optimizers(self) -> Any:
        """Give each half of the parameters a rate of its own."""
        raise NotImplementedError


def test_a_subclass_with_its_own_groups_is_not_tried() -> None:
    schedule: Any = partial(LambdaLR, lr_lambda=[float, float])
    with pytest.raises(ValueError, match="Expected 1 lr_lambdas, but got 2"):
        try_optimization(PretrainModule("base", lr_scheduler=schedule), {})
    try_optimization(TwoGroups("base", lr_scheduler=schedule), {})

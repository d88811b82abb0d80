"""A finished or begun run's folder is not replaced, `~` is expanded once, the model's tokenizer is the data's."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_mixcn.cli import main
from tests.extended_tokenizers import HAN, extend
from tests.test_trainer_cli import CONFIG, run, write_source


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration of one step, whose folder is ``runs/tiny``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_source(tmp_path / "zh.jsonl", "今天天气很好。")
    write_source(tmp_path / "en.jsonl", "The weather is fine. ")
    content: dict[str, Any] = yaml.safe_load(CONFIG)
    content["model"]["init_args"] |= {"base": str(tiny_base)}
    content["trainer"] |= {"max_steps": 1, "limit_val_batches": 1, "val_check_interval": 2}
    return content


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


ROOT = Path("runs/tiny")


def test_fast_dev_run_writes_nothing(config: dict[str, Any]) -> None:
    assert run(config) == 0
    before = digests(ROOT)
    callbacks = [*config["trainer"]["callbacks"], {"class_path": "RunFacts"}, {"class_path": "ExpertLoadMonitor"}]
    config["trainer"] |= {"callbacks": callbacks, "fast_dev_run": True}
    assert run(config) == 0
    assert run(config, "validate") == 0
    assert run(config, "fit", "--trainer.fast_dev_run=2", "--ckpt_path=last") == 0
    assert digests(ROOT) == before
    assert run(config, "fit", "--trainer.default_root_dir=other") == 0
    assert not Path("other").exists()


def test_a_second_run_is_refused(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config) == 0
    before = digests(ROOT)
    for options in ((), ("--ckpt_path", "elsewhere.ckpt")):
        Path("elsewhere.ckpt").write_bytes(b"")
        capsys.readouterr()
        assert run(config, "fit", *options) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixcn: error:")]
        for way in ("'runs/tiny'", "--ckpt_path last", "--trainer.default_root_dir", "--overwrite"):
            assert way in line
    assert digests(ROOT) == before
    for name in ("config.yaml", "checkpoints", "adapter"):  # any of these alone is a run
        alone = Path("alone", name)
        alone.parent.mkdir()
        (ROOT / name).rename(alone)
        assert run(config, "fit", "--trainer.default_root_dir=alone") == 2
        alone.rename(ROOT / name)
        alone.parent.rmdir()
    assert digests(ROOT) == before


@pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint available:UserWarning")
def test_a_run_s_folder_is_for_evaluation_and_for_going_on(config: dict[str, Any]) -> None:
    assert run(config, "validate", "--trainer.default_root_dir", "runs/tiny") == 0  # no run holds it
    assert run(config, "fit", "--ckpt_path=last") == 0  # there is no checkpoint yet: a requeued job's first time
    for command in ("validate", "test", "predict"):
        assert run(config, command, "--ckpt_path=last") == 0
    config["trainer"]["max_steps"] = 2
    assert run(config, "fit", "--ckpt_path", str(ROOT / "checkpoints/last.ckpt")) == 0
    assert (ROOT / "checkpoints/last.ckpt").resolve().name == "step=00000002.ckpt"


def test_overwrite_removes_what_is_a_run_s(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config["trainer"]["max_steps"] = 2
    assert run(config) == 0
    assert run(config, "validate", "--ckpt_path=last") == 0
    mine = [ROOT / "notes.txt", ROOT / "checkpoints/notes.txt", ROOT / "adapter_mine/x", ROOT / "before/config.yaml"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    before = digests(ROOT)
    assert run(config, "fit", "--overwrite", "--ckpt_path=last") == 2
    assert "`--overwrite` begins a new run, `--ckpt_path last` goes on" in capsys.readouterr().err
    # What is wrong with the new run is seen before anything of the old one is removed.
    for wrong in (
        ("--data.init_args.sources", '[{"name": "zh", "path": "none*.jsonl"}]'),
        ("--model.init_args.lora.target_modules", "[fc1]"),
        ("--model.init_args.base", "nowhere"),
        ("--model.init_args.optimizer.init_args.lr", "-1"),
    ):
        assert _failed(config, "--overwrite", *wrong)
        after = digests(ROOT)  # Lightning opens a file of events before it builds anything
        assert {name: after[name] for name in before} == before, wrong
    assert run(config, "fit", "--overwrite", "--trainer.max_steps=1") == 0
    names = {path.name for path in ROOT.iterdir()}
    assert names == {
        "adapter", "adapter_best", "adapter_mine", "before", "checkpoints", "config.yaml", "notes.txt",
        "samples.jsonl", "tensorboard",
    }  # fmt: skip
    assert all(path.read_text(encoding="utf-8") == "mine" for path in mine)
    assert sorted(path.name for path in (ROOT / "checkpoints").glob("*.ckpt")) == ["last.ckpt", "step=00000001.ckpt"]
    (events,) = (ROOT / "tensorboard").glob("events*")
    assert events.stat().st_size > 1000
    assert "overwrite" not in (ROOT / "config.yaml").read_text(encoding="utf-8")


def _failed(config: dict[str, Any], *options: str) -> bool:
    try:
        return run(config, "fit", *options) != 0
    except ValueError:  # torch's own, of a learning rate
        return True


def test_home_is_expanded_once_for_all(config: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "base").symlink_to(tiny_base)
    config["model"]["init_args"] |= {"base": "~/base", "tokenizer": "~/base"}
    config["trainer"] |= {
        "default_root_dir": "~/runs/x",
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "~/log"}},
    }
    config["trainer"]["callbacks"][0]["init_args"]["prompts"] = ["~/今天"]
    config["trainer"]["callbacks"][1]["init_args"]["dirpath"] = "~/kept"
    assert run(config) == 0
    assert not Path("~").exists()
    assert {path.name for path in home.iterdir()} == {"base", "runs", "log", "kept"}
    assert (home / "runs/x/adapter").is_dir()
    sample = json.loads((home / "runs/x/samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert sample["prompt"] == "~/今天"
    assert run(config, "validate", "--ckpt_path=~/kept/last.ckpt") == 0
    config["model"]["init_args"]["adapter"] = "~/runs/x"
    assert run(config, "fit", "--trainer.default_root_dir=~/runs/y", "--trainer.callbacks=null") == 0


@pytest.mark.parametrize("given", ["nowhere", "other"])
def test_another_tokenizer_for_the_data_is_refused(
    given: str, config: dict[str, Any], capsys: pytest.CaptureFixture[str], tiny_base: Path
) -> None:
    config["data"]["init_args"]["tokenizer"] = given
    if given == "other":
        extend(tiny_base, Path("other"), HAN, 120)
    assert run(config) == 2
    assert f"`data.init_args.tokenizer='{given}'` is not the model's" in capsys.readouterr().err
    assert not ROOT.exists()
    config["data"]["init_args"]["tokenizer"] = os.path.relpath(tiny_base)
    assert run(config) == 0
    assert main(["fit", "--config", "runs/tiny/config.yaml", "--trainer.default_root_dir=again"]) == 0


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("packing", ["documents", "best_fit"])
def test_epochs_end_with_their_schedule(accumulate: int, packing: str, config: dict[str, Any]) -> None:
    """The steps that are counted are those that a run without a bound takes until its sources end."""
    config["trainer"] |= {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": accumulate, "callbacks": None}
    config["trainer"] |= {"limit_val_batches": 0}
    config["data"]["init_args"] |= {"packing": packing, "sequence_length": 96}
    config["model"]["init_args"]["lr_scheduler"]["init_args"] |= {"final_fraction": 0.0}
    assert run(config) == 0
    saved = torch.load(ROOT / "checkpoints/last.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.0, abs=1e-12)
    counted = json.loads((ROOT / "epochs.json").read_text(encoding="utf-8"))["rows"]
    assert saved["global_step"] == -(-(-(-counted // 2)) // accumulate)

    # The same by the sources alone: neither steps nor epochs are bounded, the schedule has its own length.
    del config["trainer"]["max_epochs"]
    for source in config["data"]["init_args"]["sources"]:
        source["max_epochs"] = 2
    config["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"] = 999
    config["trainer"] |= {"default_root_dir": "unbounded", "max_steps": 500}
    assert run(config) == 0
    unbounded = torch.load("unbounded/checkpoints/last.ckpt", weights_only=True)
    assert unbounded["global_step"] == saved["global_step"]
    rows = [content["PretrainDataModule"]["rows"] for content in (saved, unbounded)]
    assert rows[0] == rows[1]


def test_epochs_are_counted_once(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["trainer"] |= {"max_steps": -1, "max_epochs": 1, "limit_val_batches": 0}
    config["trainer"]["callbacks"] = [{"class_path": "StepCheckpoint", "init_args": {"every_n_steps": 2, "keep": 99}}]
    assert run(config) == 0
    last = (ROOT / "checkpoints/last.ckpt").resolve()
    whole = torch.load(last, weights_only=True)
    last.unlink()
    (ROOT / "checkpoints/last.ckpt").unlink()
    monkeypatch.setattr("lightning_mixcn.data.StreamDataModule.count_rows", None)
    assert run(config, "fit", f"--ckpt_path={ROOT}/checkpoints/step=00000002.ckpt") == 0
    resumed = torch.load(last, weights_only=True)
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())
    first = f"--ckpt_path={ROOT}/checkpoints/step=00000002.ckpt"
    assert run(config, "fit", first, "--trainer.accumulate_grad_batches=1") == 2
    assert "so the steps of an epoch are not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_epochs": 3, "max_steps": 9}, "both say how long the run is. Give one of them"),
        ({"max_epochs": 0, "max_steps": -1}, "`trainer.max_epochs=0`: expected at least 1"),
        ({"max_steps": -1}, "Set `trainer.max_steps`, `trainer.max_epochs`"),
    ],
)
def test_a_length_that_is_none_is_refused(
    settings: dict[str, Any], message: str, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["trainer"] |= settings
    assert run(config) == 2
    assert message in capsys.readouterr().err


def test_rows_beyond_the_context_are_warned_of(config: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    config["data"]["init_args"] |= {"sequence_length": 600, "micro_batch_size": 1}
    with pytest.warns(UserWarning, match=r"sequence_length=600` exceeds the base's max_position_embeddings of 512 tok"):
        assert run(config) == 0

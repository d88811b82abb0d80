"""A finished or begun run's folder is not replaced, `~` is expanded once, the model's tokenizer is the data's."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from lightning_mixcn.cli import main
from lightning_mixcn.cli.settings import forget_tokenizer, settle_tokenizer
from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.testing import run_distributed
from tests.cli.test_trainer import CONFIG, run, write_source
from tests.extended_tokenizers import HAN, extend


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return a configuration of one step, whose folder is ``runs/tiny``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return one_step(tmp_path, tiny_base)


def one_step(folder: Path, base: Path) -> dict[str, Any]:
    write_source(folder / "zh.jsonl", "今天天气很好。")
    write_source(folder / "en.jsonl", "The weather is fine. ")
    content: dict[str, Any] = yaml.safe_load(CONFIG)
    content["model"]["init_args"] |= {"base": str(base)}
    content["trainer"] |= {"max_steps": 1, "limit_val_batches": 1, "val_check_interval": 2}
    return content


@pytest.fixture(scope="module")
def finished_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of that configuration, for all tests that begin with one."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        assert run(one_step(folder, tiny_base)) == 0
    return folder / ROOT


@pytest.fixture
def finished(config: dict[str, Any], finished_run: Path) -> dict[str, Any]:
    """Return the configuration, whose run is there."""
    shutil.copytree(finished_run, ROOT, symlinks=True)
    return config


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


def test_a_second_run_is_refused(finished: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(ROOT)
    for options in ((), ("--ckpt_path", "elsewhere.ckpt")):
        Path("elsewhere.ckpt").write_bytes(b"")
        capsys.readouterr()
        assert run(finished, "fit", *options) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixcn: error:")]
        for way in ("'runs/tiny'", "--ckpt_path last", "--trainer.default_root_dir", "--overwrite"):
            assert way in line
    assert digests(ROOT) == before
    for name in ("config.yaml", "checkpoints", "adapter"):  # any of these alone is a run
        alone = Path("alone", name)
        alone.parent.mkdir()
        (ROOT / name).rename(alone)
        assert run(finished, "fit", "--trainer.default_root_dir=alone") == 2
        alone.rename(ROOT / name)
        alone.parent.rmdir()
    assert digests(ROOT) == before


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([("AdapterCheckpoint", {"folder": "../precious"})], "`folder='../precious'`: expected a plain name"),
        ([("AdapterCheckpoint", {"folder": "precious"})], "it has no adapter_config.json. Move it away"),
        (
            [("AdapterCheckpoint", {}), ("StepCheckpoint", {"dirpath": "runs/tiny/adapter/a"})],
            "is in 'adapter', another",
        ),
        ([("StepCheckpoint", {"dirpath": "runs/tiny/tensorboard"})], "is in 'tensorboard', another"),
        ([("StepCheckpoint", {"dirpath": "a"}), ("StepCheckpoint", {"dirpath": "./a"})], "two StepCheckpoint keep"),
        (
            [("SampleText", {"prompts": ["a"]})] * 2,
            "SampleText writes 'samples.jsonl' into the run's folder, and so does",
        ),
        ([("RunFacts", {})] * 2, "RunFacts writes 'facts.json' into the run's folder, and so does RunFacts"),
        ([("AdapterCheckpoint", {}), ("AdapterCheckpoint", {"folder": "adapter_best"})], "writes 'adapter_best'"),
    ],
)
def test_outputs_that_would_meet_are_refused_before_anything_is_written(
    callbacks: list[tuple[str, dict[str, Any]]],
    message: str,
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    precious = Path("runs/tiny/precious/thesis.txt")
    precious.parent.mkdir(parents=True)
    precious.write_text("mine", encoding="utf-8")
    config["trainer"]["callbacks"] = [{"class_path": name, "init_args": given} for name, given in callbacks]
    assert run(config) == 2
    assert message in capsys.readouterr().err
    assert digests(ROOT).keys() == {"precious/thesis.txt"}


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


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("packing", ["documents", pytest.param("best_fit", marks=pytest.mark.slow)])
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
    assert saved["global_step"] == math.ceil(math.ceil(counted / 2) / accumulate)

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


def test_overwrite_removes_nothing_where_no_run_is(config: dict[str, Any]) -> None:
    """Evaluation alone is no run, and names that a run uses are no proof of one."""
    for name in (
        "config.train.yaml",
        "samples.jsonl",
        "facts.json",
        "long_context/mine.csv",
        "figures/experts_load_step_00000002.png",
        "tensorboard/hparams.yaml",
    ):
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    config["trainer"]["callbacks"] = None
    assert run(config, "validate", f"--trainer.default_root_dir={ROOT}") == 0
    before = digests(ROOT)
    assert run(config, "fit", "--overwrite", "--trainer.logger=false") == 0
    after = digests(ROOT)
    assert {name: after[name] for name in before} == before


def test_overwrite_removes_a_run_s_figures_and_no_others(config: dict[str, Any]) -> None:
    (ROOT / "figures").mkdir(parents=True)
    (ROOT / "figures" / "experts_load_step_00000900.png").touch()
    (ROOT / "figures" / "mine.png").touch()
    (ROOT / "config.yaml").touch()
    config["trainer"] |= {"logger": False, "max_steps": 1, "limit_val_batches": 0}
    assert run(config, "fit", "--overwrite") == 0
    assert {path.name for path in (ROOT / "figures").glob("*.png")} == {"mine.png"}


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # the finished run was copied
def test_overwrite_keeps_other_configurations(finished: dict[str, Any]) -> None:
    for command in ("validate", "test", "predict"):
        assert run(finished, command, "--ckpt_path=last") == 0
    (ROOT / "config.zh.yaml").write_text("mine", encoding="utf-8")
    (ROOT / "epochs.json").write_text('{"rows": 1, "order": {}}', encoding="utf-8")
    assert run(finished, "fit", "--overwrite") == 0
    names = {path.name for path in ROOT.iterdir() if path.name.startswith(("config", "epochs"))}
    assert names == {"config.yaml", "config.zh.yaml"}


def test_overwrite_counts_epochs_for_the_new_run(config: dict[str, Any]) -> None:
    config["trainer"] |= {"max_steps": -1, "max_epochs": 1, "limit_val_batches": 0, "callbacks": None}
    assert run(config) == 0
    counted = (ROOT / "epochs.json").read_bytes()
    assert run(config, "fit", "--overwrite") == 0
    assert (ROOT / "epochs.json").read_bytes() == counted


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model.init_args.adapter", "runs/tiny"),
        ("model.init_args.adapter", "runs/tiny/adapter"),
        ("model.init_args.adapter", "linked"),
        ("model.init_args.base", "runs/tiny/adapter/base"),
        ("model.init_args.tokenizer", "runs/tiny/adapter/base"),
        ("data.init_args.sources[0].path", "runs/tiny/samples.jsonl"),
        ("data.init_args.sources[1].path", "runs/tiny/*.jsonl"),
        ("data.init_args.sources[0].path", "runs"),
        ("data.init_args.sources[0].path", ["zh.jsonl", "runs/tiny/samples.jsonl"]),
        ("data.init_args.test_sources[0].path", "runs/tiny/samples.jsonl"),
        ("--config", "runs/tiny/config.yaml"),
    ],
)
def test_overwrite_does_not_remove_what_the_new_run_reads(
    option: str, value: Any, finished: dict[str, Any], tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("linked").symlink_to("runs/tiny/adapter")
    shutil.copytree(tiny_base, ROOT / "adapter/base")
    before = digests(ROOT)
    parent: Any = finished
    *path, last = option.replace("[", ".").replace("]", "").split(".")
    if option == "--config":
        assert main(["fit", option, value, "--overwrite"]) == 2
    else:
        for key in path:
            parent = parent[int(key)] if key.isdigit() else parent[key]
        parent[last] = value
        assert run(finished, "fit", "--overwrite") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixcn: error:")]
    shown = value[1] if isinstance(value, list) else value
    assert f"`{option}={shown!r}` " in line
    relation = "contains some of" if value in ("runs", "runs/tiny") else "is in"
    assert f"` {relation} what `--overwrite` would remove ('runs/tiny/" in line
    assert "Choose another `trainer.default_root_dir`" in line
    assert digests(ROOT) == before


def test_overwrite_needs_a_folder(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("mine", encoding="utf-8")
    assert run(config, "fit", "--overwrite", "--trainer.default_root_dir=taken") == 2
    assert "`trainer.default_root_dir='taken'` is a file, expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restarted_job_does_not_overwrite_its_own_run(
    count: str, config: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(count, "0")
    assert run(config, "fit", "--overwrite") == 0
    before = digests(ROOT)
    monkeypatch.setenv(count, "1")
    assert run(config, "fit", "--overwrite") == 2
    error = capsys.readouterr().err
    assert f"{count}=1" in error
    assert "`--ckpt_path last`" in error
    assert digests(ROOT) == before


@pytest.mark.parametrize("lost", ["checkpoints", "checkpoints/last.ckpt", "checkpoints/step=00000001.ckpt"])
def test_last_without_a_checkpoint_does_not_replace_the_adapter(
    lost: str, finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (ROOT / lost).rename("lost")
    before = digests(ROOT)
    assert run(finished, "fit", "--ckpt_path=last") == 2
    error = capsys.readouterr().err
    assert "`--ckpt_path last`" in error
    assert "'runs/tiny' holds an adapter" in error
    assert digests(ROOT) == before


@pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint available:UserWarning")
def test_a_job_that_was_killed_before_its_first_checkpoint_begins_again(finished: dict[str, Any]) -> None:
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(ROOT / name)
    assert run(finished, "fit", "--ckpt_path=last") == 0


def test_epochs_that_no_source_takes_are_refused(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config["trainer"] |= {"max_steps": -1, "max_epochs": 1, "limit_val_batches": 0, "callbacks": None}
    assert run(config) == 0
    again = ["fit", "--config", "runs/tiny/config.yaml", "--trainer.default_root_dir=again"]
    assert main([*again, "--trainer.max_epochs=2"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixcn: error:")]
    assert "`trainer.max_epochs=2` has no effect: every source has its own `max_epochs` (zh 1, en 1)" in line
    assert not Path("again").exists()
    assert main([*again, "--trainer.max_epochs=1"]) == 0
    config["data"]["init_args"]["sources"][0]["max_epochs"] = 2  # the other takes the trainer's
    assert run(config, "fit", "--overwrite") == 0
    saved = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    assert [source["max_epochs"] for source in saved["data"]["init_args"]["sources"]] == [2, 1]


@pytest.mark.parametrize("callbacks", [None, [{"class_path": "EpochBudget"}]])
def test_fast_dev_run_counts_nothing(
    callbacks: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_mixcn.data.StreamDataModule.count_rows", None)
    config["trainer"] |= {"max_steps": -1, "callbacks": callbacks, "fast_dev_run": 2, "accumulate_grad_batches": 1}
    for source in config["data"]["init_args"]["sources"]:
        source["max_epochs"] = 1
    assert run(config) == 0
    assert "EpochBudget" not in capsys.readouterr().err


def test_home_is_expanded_in_lists_of_paths(config: dict[str, Any], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("zh", "en"):
        Path(f"{name}.jsonl").rename(home / f"{name}.jsonl")
    config["data"]["init_args"] |= {
        "sources": [{"name": "zh", "path": ["~/zh.jsonl", "~/en.jsonl"]}],
        "test_sources": [],
        "predict_sources": [],
    }
    assert run(config) == 0
    (source,) = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]["sources"]
    assert source["path"] == [str(home / "zh.jsonl"), str(home / "en.jsonl")]


def test_a_run_keeps_no_secret(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    url = "memory://user:Secret.1@host/zh.jsonl"
    with fsspec.open(url, "wb") as opened:
        opened.write(Path("zh.jsonl").read_bytes())
    config["data"]["init_args"]["sources"][0]["path"] = url
    assert run(config) == 0
    assert run(config, "fit", "--ckpt_path=last") == 0
    found = [path for path in Path("runs").rglob("*") if path.is_file() and b"Secret.1" in path.read_bytes()]
    assert found == []
    (masked, _) = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]["sources"]
    assert masked["path"] == "memory://<masked>@host/zh.jsonl"
    capsys.readouterr()
    assert main(["fit", "--config", "runs/tiny/config.yaml", "--ckpt_path=last"]) == 2
    shown = capsys.readouterr().err
    assert (
        "mixcn: error: `path='memory://<masked>@host/zh.jsonl'` is masked: configurations that a run writes hold"
        in shown
    )


def test_only_a_tokenizer_that_was_derived_is_left_out() -> None:
    """A model with a tokenizer but no base leaves the data's tokenizer as it was given."""
    given = Namespace(
        model=Namespace(init_args=Namespace(tokenizer="own")), data=Namespace(init_args=Namespace(tokenizer="given"))
    )
    settle_tokenizer(given)
    forget_tokenizer(given)
    assert given.data.init_args.tokenizer == "given"


def test_ranks_count_their_own_streams(config: dict[str, Any]) -> None:
    """The rows of all streams end with the last row of any of them, so shares of streams can be counted apart."""
    sources = [{"name": name, "path": f"{name}.jsonl", "max_epochs": 2} for name in ("zh", "en")]
    settings = config["data"]["init_args"] | {"sources": sources, "tokenizer": config["model"]["init_args"]["base"]}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PretrainDataModule, "data")
    data = parser.instantiate_classes(
        parser.parse_object({"data": {"class_path": "PretrainDataModule", "init_args": settings}})
    ).data
    data.setup("fit")
    made: list[int] = []
    whole = data.count_rows(lambda: made.append(-1))
    for ranks in (1, 3, 4, 7):
        counts = [data.count_rows(lambda: made.append(ranks), range(rank, 4, ranks)) for rank in range(ranks)]  # noqa: B023
        assert max(counts) == whole
        assert made.count(ranks) == made.count(-1)


COUNTING = """
import json, os
from pathlib import Path
from lightning_mixcn import PretrainDataModule

class Counting(PretrainDataModule):
    def count_rows(self, on_row=lambda: None, streams=None):
        Path(f"counted-{os.environ.get('LOCAL_RANK', 0)}.json").write_text(json.dumps(list(streams)))
        return super().count_rows(on_row, streams)
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_count_as_one_does(config: dict[str, Any]) -> None:
    Path("counting.py").write_text(COUNTING, encoding="utf-8")
    config["trainer"] |= {"max_steps": -1, "max_epochs": 1, "limit_val_batches": 0, "callbacks": None}
    assert run(config, "fit", "--trainer.default_root_dir=alone") == 0
    config["data"]["class_path"] = "counting.Counting"
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    Path("tiny.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    command = ["fit", "--config", "tiny.yaml"]
    for _ in range(2):
        assert run_distributed(main, 2, command) == [0, 0]
        assert (ROOT / "epochs.json").read_bytes() == Path("alone/epochs.json").read_bytes()
        if command[-1] != "last":
            counted = [json.loads(Path(f"counted-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
            assert counted == [[0, 2], [1, 3]]
            for rank in range(2):
                Path(f"counted-{rank}.json").unlink()
            command += ["--ckpt_path", "last"]
    assert not list(Path().glob("counted-*.json"))  # rank 0 read the file, the other received it

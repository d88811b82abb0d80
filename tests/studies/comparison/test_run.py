import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mixcn.studies.comparison.run import ComparedRun, check_inputs, config_fingerprint, files_fingerprint

CONFIG: dict[str, Any] = {
    "seed_everything": 7,
    "ckpt_path": None,
    "model": {"class_path": "PretrainModule", "init_args": {"base": "b", "quantization": "none", "seed": 7}},
    "data": {"class_path": "Mine", "init_args": {}},
    "trainer": {
        "max_steps": 3,
        "callbacks": [
            {"class_path": "lightning_mixcn.callbacks.RunFacts"},
            {"class_path": "lightning_mixcn.callbacks.StepCheckpoint", "init_args": {"every_n_steps": 2}},
        ],
    },
}
FACTS = {"steps": 4, "planned_steps": 4, "validations": [{"step": 2}, {"step": 4}]}


@pytest.fixture
def run(tmp_path: Path) -> ComparedRun:
    run = ComparedRun("my arm", 3, tmp_path / "run", validations=2)
    run.write_config(CONFIG, text_bytes=100)
    return run


def write_facts(run: ComparedRun, **changes: Any) -> None:
    (run.folder / "fit").mkdir(exist_ok=True)
    (run.folder / "fit" / "facts.json").write_text(json.dumps(FACTS | changes), encoding="utf-8")


def write_checkpoint(run: ComparedRun) -> Path:
    checkpoint = run.folder / "fit" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    return checkpoint


def test_its_configuration(run: ComparedRun) -> None:
    written = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    assert written["seed_everything"] == written["model"]["init_args"]["seed"] == 3
    assert written["data"]["init_args"] == {}  # a class without a seed gets none
    assert "ckpt_path" not in written
    names = [callback["class_path"].rpartition(".")[2] for callback in written["trainer"]["callbacks"]]
    assert names == ["StepCheckpoint", "ByteBudget", "RunFacts"]
    assert written["trainer"]["callbacks"][1]["init_args"] == {"text_bytes": 100, "validations": 2}
    assert CONFIG["model"]["init_args"]["seed"] == 7  # arms share it


OURS: dict[str, Any] = {
    "model": {"class_path": "lightning_mixcn.PretrainModule", "init_args": {"base": "b", "seed": 0}},
    "data": {"class_path": "lightning_mixcn.PretrainDataModule",
             "init_args": {"sources": ["zh"], "val_sources": ["held out"], "seed": 0}},
    "trainer": {},
}  # fmt: skip


def started(folder: Path, seed: int, model: dict[str, Any], data: dict[str, Any]) -> ComparedRun:
    config = json.loads(json.dumps(OURS))
    config["model"]["init_args"] |= model
    config["data"]["init_args"] |= data
    run = ComparedRun("arm", seed, folder, validations=1)
    run.write_config(config, text_bytes=100)
    return run


@pytest.mark.parametrize(
    ("model", "data", "same"),
    [
        ({}, {}, True),
        ({"kl_to_base": {"coefficient": 1.0}, "train_only": {"layers": [1]}, "learning_rates": {}}, {}, True),
        ({}, {"sources": ["zh", "en"], "weight_unit": "bytes"}, True),
        ({"base": "another"}, {}, False),
        ({"quantization": "nf4"}, {}, False),
        ({"tokenizer": "longer"}, {}, False),
        ({"lora_start": "rounding_error"}, {}, False),
        ({"lora": {"init_args": {"init_lora_weights": False}}}, {}, False),
        ({}, {"val_sources": ["other"]}, False),
        ({}, {"val_sources": []}, False),
        ({}, {"sequence_length": 8}, False),
    ],
)  # fmt: skip
def test_likelihoods_before_training_are_measured_once_for_a_model(
    model: dict[str, Any], data: dict[str, Any], same: bool, tmp_path: Path
) -> None:
    first, second = started(tmp_path / "first", 0, {}, {}), started(tmp_path / "second", 1, model, data)
    assert not second.take_start([first, second])
    (first.folder / "start").mkdir()
    (first.folder / "start" / "validate.json").write_text(json.dumps({"sources": {"zh": 1}}), encoding="utf-8")
    assert second.take_start([first, second]) is same
    assert (second.start() == {"zh": 1}) is same


def test_own_classes_are_measured_each(tmp_path: Path) -> None:
    first, second = started(tmp_path / "first", 0, {}, {}), started(tmp_path / "second", 0, {}, {})
    for run in (first, second):
        config = run.folder / "config.yaml"
        text = config.read_text(encoding="utf-8").replace("lightning_mixcn.PretrainModule", "mine.Module")
        config.write_text(text, encoding="utf-8")
    (first.folder / "start").mkdir()
    (first.folder / "start" / "validate.json").write_text(json.dumps({"sources": {"zh": 1}}), encoding="utf-8")
    assert not second.take_start([first, second])


def test_a_fit_goes_on_where_there_is_a_checkpoint(run: ComparedRun) -> None:
    assert run.fit_command() == ["fit", "--config", str(run.folder / "config.yaml")]
    write_checkpoint(run)
    assert run.fit_command()[-1] == "--ckpt_path=last"


def test_benchmarks_hold_the_model_as_it_was_trained(run: ComparedRun) -> None:
    command = run.evaluate_command(["--tasks", "mmlu"])
    assert command == ["evaluate", str(run.folder / "fit"), "--quantization=none", "--tasks", "mmlu", "--out",
                       str(run.folder / "evaluate.json")]  # fmt: skip


@pytest.mark.parametrize(("adapter", "evaluated"), [("a", "a"), (None, "b")])
def test_a_run_without_training(adapter: str | None, evaluated: str, tmp_path: Path) -> None:
    run = ComparedRun("my arm", 0, tmp_path / "run", validations=1, trains=False)
    config = json.loads(json.dumps(CONFIG))
    config["model"]["init_args"]["adapter"] = adapter
    run.write_config(config, text_bytes=0)
    written = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    names = [callback["class_path"].rpartition(".")[2] for callback in written["trainer"]["callbacks"]]
    assert names == ["RunFacts", "StepCheckpoint"]
    assert run.evaluate_command([])[1] == evaluated
    assert run.name == "my arm"


def test_facts_count_when_they_are_whole(run: ComparedRun) -> None:
    assert run.facts() is None
    write_facts(run)
    assert run.facts() == FACTS
    write_facts(run, steps=3)
    assert run.facts() is None
    write_facts(run, validations=FACTS["validations"][:1])  # type: ignore[index]  # a list
    assert run.facts() is None


def test_a_fit_that_a_signal_ended_goes_on(run: ComparedRun) -> None:
    write_facts(run, steps=3)
    checkpoint = write_checkpoint(run)
    run.forget_what_cannot_go_on()
    assert checkpoint.exists()
    assert not (run.folder / "fit" / "facts.json").exists()


def test_a_fit_without_its_last_validation_is_done_again(run: ComparedRun) -> None:
    write_facts(run, validations=[])
    write_checkpoint(run)
    run.forget_what_cannot_go_on()
    assert [path.name for path in run.folder.iterdir()] == ["config.yaml"]


def test_a_fit_without_a_checkpoint_is_done_again(run: ComparedRun) -> None:
    (run.folder / "fit" / "tensorboard").mkdir(parents=True)
    run.forget_what_cannot_go_on()
    assert not (run.folder / "fit").exists()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "run"):
        Path(name).mkdir()
        Path(name, "weights").write_bytes(b"1")
    for name in ("zh.jsonl", "en.jsonl"):
        Path(name).write_text("{}")
    sources = [{"name": name, "path": f"{name}.jsonl", "text_key": "text"} for name in ("zh", "en")]
    model = {"base": "base", "tokenizer": "prepared/longer", "adapter": "run"}
    return {"model": {"init_args": model}, "data": {"init_args": {"sources": sources, "val_sources": []}}}


def test_what_will_be_prepared_may_come(config: dict[str, Any]) -> None:
    check_inputs(config, Path("prepared"))


@pytest.mark.parametrize("train_only", ["prepared/choice.json", "choice.json", {"layers": [1]}, None])
def test_a_choice_of_what_trains(train_only: Any, config: dict[str, Any]) -> None:
    """A file that is there or will be prepared, or in place."""
    Path("choice.json").write_text("{}")
    config["model"]["init_args"]["train_only"] = train_only
    check_inputs(config, Path("prepared"))
    assert ("choice.json" in config_fingerprint(config)) == (train_only == "choice.json")


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("model", "base", "gone", "'gone' is not there"),
        ("model", "tokenizer", "longer", "'longer' is not there"),
        ("model", "adapter", "other", "'other' is not there"),
        ("model", "train_only", "my/choice.json", "train_only='my/choice.json'` is not there. Make it with `mixcn ex"),
        (
            "data",
            "val_sources",
            [{"name": "zh", "path": "x*.jsonl", "text_key": "text"}],
            r"val_sources\[0\].*x\*.jsonl",
        ),
        ("data", "sources", [{"name": "zh", "path": "x.json", "records": None}], r"sources\[0\].*x.json"),
    ],
)
def test_what_is_not_there(part: str, name: str, value: Any, message: str, config: dict[str, Any]) -> None:
    config[part]["init_args"][name] = value
    with pytest.raises(FileNotFoundError, match=message):
        check_inputs(config, Path("prepared"))


def test_a_changed_file_changes_the_fingerprint(config: dict[str, Any]) -> None:
    before = config_fingerprint(config)
    assert set(before) == {"base", "run", "zh.jsonl", "en.jsonl"}
    assert config_fingerprint(config) == before
    Path("base", "weights").write_bytes(b"12")
    os.utime("zh.jsonl", ns=(0, 0))
    after = config_fingerprint(config)
    assert [path for path in before if before[path] != after[path]] == ["base", "zh.jsonl"]


def test_globs_and_what_is_elsewhere(config: dict[str, Any]) -> None:
    found = files_fingerprint(["*.jsonl", "gone", "s3://bucket/zh/*.parquet", "--vocab_size"])
    assert list(found) == ["*.jsonl"]


def test_linked_folders_are_seen(config: dict[str, Any]) -> None:
    Path("data").mkdir()
    Path("data/linked").symlink_to(Path("run").absolute())
    Path("data/circle").symlink_to(".")
    Path("data/gone").symlink_to("nowhere")
    before = files_fingerprint(["data"])
    Path("run/weights").write_bytes(b"12")
    assert files_fingerprint(["data"]) != before

"""Pages of help: what they name is there, and can be given as they say."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import StrategyRegistry

import lightning_mixcn.callbacks
from lightning_mixcn.cli import help as pages
from lightning_mixcn.cli import main
from lightning_mixcn.cli.trainer import MixcnCLI
from lightning_mixcn.commands.catalogue import KINDS
from lightning_mixcn.commands.table import COMMANDS

RUNS = ("fit", "validate", "test", "predict")


@pytest.fixture(scope="module")
def parsers() -> dict[str, set[str]]:
    """Return the options of each subcommand's real parser."""

    class Parsers(MixcnCLI):
        def parse_arguments(self, parser: object, args: object) -> None:
            raise KeyboardInterrupt

    cli = Parsers.__new__(Parsers)
    with pytest.raises(KeyboardInterrupt):
        MixcnCLI.__init__(cli, ["fit"])
    return {
        name: {option for action in parser._actions for option in action.option_strings}
        for name, parser in cli._subcommand_parsers.items()
    }


def options_of(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-c, )?(--[\w.]+)", text, re.MULTILINE))


@pytest.mark.parametrize("command", RUNS)
def test_options_of_a_run_are_those_of_its_parser(command: str, parsers: dict[str, set[str]]) -> None:
    own = {option for option in options_of(pages.run_page(command)) if not option.startswith(("--model", "--data"))}
    taken = {option for option in parsers[command] if option.startswith("--") and not option.startswith("--trainer")}
    assert own - {"--trainer.max_steps"} <= parsers[command]
    assert taken - own <= {"--help", "--model", "--model.help", "--data", "--data.help"}


@pytest.mark.parametrize("command", RUNS)
def test_help_of_a_run_is_ours_first(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--config", "nowhere.yaml", "-h"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{name}") for name in ("Options", "Model:", "Data:", "Callbacks:", "Lightning's Trainer: ")]
    assert places == sorted(places)
    assert "Lightning's Trainer: `mixcn help trainer`" in text
    assert "--trainer.accelerator" not in text


def test_short_overrides_are_taken_as_the_help_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {
        "--model.lora.r": "8",
        "--model.lora.target_modules": "[q_proj]",
        "--model.optimizer.lr": "0.0003",
        "--model.lr_scheduler.warmup_fraction": "0.1",
        "--data.sequence_length": "64",
        "--trainer.callbacks.every_n_steps": "7",
    }
    assert values.keys() <= options_of(pages.run_page("fit")) | {"--trainer.callbacks.every_n_steps"}
    given = ["--model=PretrainModule", "--model.base=x", "--data=PretrainDataModule", "--data.sources=[]"]
    given += ["--trainer.callbacks+=ExpertLoadMonitor", *(f"{name}={value}" for name, value in values.items())]
    with pytest.raises(SystemExit):
        main(["fit", *given, "--print_config"])
    text = capsys.readouterr().out
    values["--model.lora.target_modules"] = "- q_proj"
    for name, value in values.items():
        assert re.search(rf"{name.rpartition('.')[2]}:\s+{value}\n", text)


def test_trainer_has_all_options_and_this_command_s_defaults(parsers: dict[str, set[str]]) -> None:
    text = pages.page("trainer")
    assert options_of(text) <= parsers["fit"]
    assert len(options_of(text)) > 30
    for name in pages._OF_THE_TRAINER:
        assert f"--trainer.{name}" in options_of(text)
    assert "--trainer.max_epochs  (int | null, default -1)" in text


def test_callbacks_of_every_run_are_marked() -> None:
    cli = MixcnCLI.__new__(MixcnCLI)
    added = set()
    settings = SimpleNamespace(
        max_steps=-1,
        fast_dev_run=False,
        enable_checkpointing=None,
        logger=None,
        enable_progress_bar=None,
        enable_model_summary=None,
    )
    for cli.subcommand in RUNS:
        added |= {type(callback).__name__ for callback in cli._default_callbacks(settings)}
    assert added == pages.ADDED_CALLBACKS


@pytest.mark.parametrize("name", KINDS)
def test_lists_have_a_line_for_each_class(name: str) -> None:
    text = pages.page(name)
    rows = re.findall(r"^  (\w+)(?: \*)? +(\S.*)?$", text, re.MULTILINE)
    assert len(rows) >= 2
    assert all(about for _, about in rows)
    assert all(len(line) <= 100 for line in text.splitlines())


def test_lists_name_all_of_ours() -> None:
    text = pages.page("callbacks")
    assert all(re.search(rf"^  {name}\b", text, re.MULTILINE) for name in lightning_mixcn.callbacks.__all__)
    for name in re.findall(r"`(\w+)`", pages._NOTES["strategies"]):
        assert name in {"auto", *StrategyRegistry}


@pytest.mark.parametrize(
    ("topic", "path"),
    [
        ("PretrainDataModule", "lightning_mixcn.PretrainDataModule"),
        ("ExpertLoadMonitor", "lightning_mixcn.callbacks.ExpertLoadMonitor"),
        ("EarlyStopping", "lightning.pytorch.callbacks.EarlyStopping"),
        ("AdamW", "torch.optim.AdamW"),
        ("LoraConfig", "lightning_mixcn.modules.causal_lm.LoraConfig"),
        ("bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.AdamW8bit"),
        ("Source", "lightning_mixcn.text.Source"),
    ],
)
def test_a_class_is_found_by_its_name(topic: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", topic]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{path}\n")
    assert "\nArguments\n" in text


def test_a_command_is_explained_as_by_its_own_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ["quantize", "vocab train", "preference"]:
        assert main(["help", *command.split()]) == 0
        by_topic = capsys.readouterr().out
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        own = capsys.readouterr().out  # with `--print_completion` once a run has been parsed in this process
        assert set(by_topic.split()) <= set(own.split())
        assert f"usage: mixcn {command}" in by_topic


def test_no_topic_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    assert COMMANDS["help"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("topic", "near"),
    [
        ("ExpertLoadMonitr", "ExpertLoadMonitor"),
        ("PretrianDataModule", "PretrainDataModule"),
        ("callback", "callbacks"),
        ("quantise", "quantize"),
        ("lightning_mixcn.PretrainModul", "PretrainModule"),
        ("EarlyStoping", "EarlyStopping"),
    ],
)
def test_a_misspelt_topic_says_which_was_meant(topic: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", topic]) == 2
    error = capsys.readouterr().err
    assert f"there is no such command, list or class (did you mean {near!r}?). Give " in error
    assert error.count("\n") == 1

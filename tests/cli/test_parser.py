"""Configurations: every key is known or refused, and every file of one is checked, however it is named."""

import os
import threading
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_mixcn.cli import main
from lightning_mixcn.cli.parser import check_what_is_loaded
from lightning_mixcn.modules import WarmupStableDecay

BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))])


def configuration() -> dict[str, Any]:
    """Return one whose base is not there, so that it gets past the parser and no further."""
    return {
        "model": {"class_path": "PretrainModule", "init_args": {"base": "nowhere", "lora": {"r": 4}}},
        "data": {"class_path": "PretrainDataModule", "init_args": {"sources": [{"name": "zh", "path": "zh.jsonl"}]}},
        "trainer": {"max_steps": 1, "callbacks": [{"class_path": "StepCheckpoint", "init_args": {"keep": 2}}]},
    }


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main(["fit", *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixcn: error:")]
    return line


def write(name: str, value: Any) -> str:
    Path(name).write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
    return name


def test_the_configuration_itself_gets_past_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration()
    for key in ("optimizer", "lr_scheduler"):
        config["model"]["init_args"][key] = {"class_path": {"optimizer": "torch.optim.SGD"}.get(key, "WarmupCosine")}
        config["model"]["init_args"][key]["init_args"] = {}
    config["model"]["init_args"]["lora"] = {"rank_pattern": {}}
    config["trainer"]["callbacks"][0]["init_args"] = {}
    config["trainer"]["logger"] = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "."}, "dict_kwargs": {}}
    assert "'nowhere' is not there" in refusal(capsys, "--config", write("c.yaml", config))


def test_another_schedule_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments of the default schedule that have the same names would be kept."""
    config, given = configuration(), {"warmup": 100, "decay": 0.25}
    config["model"]["init_args"]["lr_scheduler"] = {"class_path": "WarmupStableDecay", "init_args": given}
    with pytest.raises(SystemExit):
        main(["fit", "--config", write("c.yaml", config), "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["lr_scheduler"]["init_args"]
    defaults = {name: parameter.default for name, parameter in signature(WarmupStableDecay).parameters.items()}
    del defaults["optimizer"]
    assert found == defaults | given
    assert [type(found[name]) for name in given] == [int, float]


@pytest.mark.parametrize("value", [{}, {"a": {}}, {"a": {"b": {}}, "c": {}}], ids=str)
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("modle", "Option 'modle{}' is not accepted (did you mean 'model'?)"),
        ("trainer.max_step", "Option 'trainer.max_step{}' is not accepted (did you mean 'trainer.max_steps'?)"),
        ("model.init_args.bsae", "Option 'bsae{}' is not accepted (did you mean 'base'?)"),
        ("model.init_args.lora.lora_alhpa", "Option 'lora_alhpa{}' is not accepted (did you mean 'lora_alpha'?)"),
        ("data.init_args.sources.0.nmae", "Option 'nmae{}' is not accepted (did you mean 'name'?)"),
        ("trainer.callbacks.0.init_args.kep", "Option 'kep{}' is not accepted (did you mean 'keep'?)"),
        ("trainer.callbacks.0.kep", "trainer.callbacks: expected the name of a class, or a mapping of `class_path`"),
        ("data.nope", "data: expected the name of a class, or a mapping of `class_path` and `init_args` with no other"),
    ],
)
def test_an_unknown_key_of_an_empty_mapping(
    path: str, message: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration()
    place: Any = config
    *parents, last = path.split(".")
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    place[last] = value
    inner = {1: ".a", 2: ".a.b"}.get(len(value) and 1 + bool(value["a"]), "")
    said = refusal(capsys, "--config", write("c.yaml", config))
    assert message.format(inner).partition(" (did")[0] in said
    if not value:
        assert message.format("") in said
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "near"),
    [
        (["--trainer.max_step=3"], "trainer.max_steps"),
        (["--over"], "overwrite"),
        (["--seed=3"], "seed_everything"),
        (["--model.bas=x"], "base"),
        (["--model.lora.lora_alhpa=3"], "lora_alpha"),
        (["--data.sequence_lenght=3"], "sequence_length"),
        (["--model=PretrianModule"], "PretrainModule"),
        (["--trainer.callbacks+=ExpertLoadMonitr"], "ExpertLoadMonitor"),
        (["--trainer.callbacks+=ExpertLoadMonitor", "--trainer.callbacks.every_n=3"], "every_n_steps"),
        (["--model.optimizer=torch.optim.AdamX"], "torch.optim.Adam"),
        (["--model.lr_scheduler=WarmupCosin"], "WarmupCosine"),
        (["--trainer.logger=TensorBordLogger"], "TensorBoardLogger"),
        (["--model.quantization=nf"], "nf4"),
        (["--config=pretrain_mixtral"], "pretrain_mixtral_8x7b"),
    ],
    ids=str,
)
def test_a_slip_is_no_abbreviation_and_names_the_nearest(
    options: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "--config", write("c.yaml", configuration()), *options)
    assert said.count(f"(did you mean {near!r}?)") == 1
    assert "not accessible" not in said
    assert not Path("runs").exists()


@pytest.mark.parametrize("option", ["--trainer", "--model", "--data"])
def test_an_unknown_key_of_a_part_in_a_file_of_its_own(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    part = configuration()[option[2:]]
    (part if option == "--trainer" else part["init_args"])["nope"] = {}
    said = refusal(capsys, "--config", write("c.yaml", configuration()), option, write("part.yaml", part))
    assert "nope' is not accepted" in said


def test_init_args_that_are_no_mapping(capsys: pytest.CaptureFixture[str]) -> None:
    for value in (None, [], [1]):
        config = configuration()
        config["model"]["init_args"] = value
        assert "expected a mapping as `init_args`" in refusal(capsys, "--config", write("c.yaml", config))


BAD = {
    "a key twice": (b"max_steps: 3\nmax_steps: 4\n", "the key 'max_steps' is there twice"),
    "two documents": (b"max_steps: 3\n---\na: 1\n", "a second document begins"),
    "deep": (b"a: " + b"[" * 3000 + b"]" * 3000, "values are nested more than 64 deep"),
    "its own alias": (b"a: &a [*a]", "the alias *a is inside of what it stands for"),
    "a bomb": (BOMB.encode(), "aliases make more than 200,000 values"),
    "latin-1": ("a: z\xe9".encode("latin-1"), "byte 4 is 0xe9"),
    "utf-16": ("a: 1".encode("utf-16"), "byte 0 is 0xff"),
    "a tag": (b"a: !!python/object/apply:os.system ['x']", "could not determine a constructor"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_files_named_in_place_of_a_part(content: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("part.yaml").write_bytes(content)
    said = refusal(capsys, "--config", write("c.yaml", configuration()), "--trainer", "part.yaml")
    assert message in said
    named = configuration() | {"trainer": "part.yaml"}
    assert message in refusal(capsys, "--config", write("named.yaml", named))
    said = refusal(capsys, "--config", write("c.yaml", configuration()), "--model", "part.yaml")
    assert message in said or "can't decode byte" in said


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_pipe(content: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    writer = threading.Thread(target=Path("pipe").write_bytes, args=(content,))
    writer.start()
    said = refusal(capsys, "--config", "pipe")
    writer.join()
    assert message in said


@pytest.mark.parametrize("option", ["--config", "--trainer"])
def test_a_pipe_without_end(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    config = write("c.yaml", configuration())

    def write_on() -> None:
        with suppress(BrokenPipeError), Path("pipe").open("wb") as pipe:
            while True:
                pipe.write(b"# no end\n" * 2**17)

    writer = threading.Thread(target=write_on, daemon=True)
    writer.start()
    assert "has more than 16,777,216 characters" in refusal(capsys, "--config", config, option, "pipe")
    writer.join()


def test_a_value_that_is_no_configuration_is_any_text() -> None:
    check_what_is_loaded()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--text", type=str)
    for text in ("a: 1\na: 2", "[" * 100, "a: *b", "---\na\n---\nb", "&a [*a]"):
        assert parser.parse_args([f"--text={text}"]).text == text

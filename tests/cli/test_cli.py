"""The command: what it answers at once, and how it explains errors."""

import subprocess
import sys
from collections.abc import Callable

import pytest

import lightning_mixcn
from lightning_mixcn import cli
from lightning_mixcn.commands.process import CommandFailed


def test_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, what in cli.COMMANDS.items():
        assert name in text
        assert what in text


def test_no_arguments_is_no_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: mixcn" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mixcn {lightning_mixcn.__version__}\n"


def test_an_unknown_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == (
        "mixcn: error: unknown subcommand 'train'. Expected one of fit, validate, test, predict, upcycle, quantize, "
        "export, chat, evaluate, experts, vocab, compare, preference, quantization; see mixcn --help\n"
    )


def raising(error: Exception, module: str) -> Callable[[list[str]], None]:
    """A function of ``module`` that raises ``error``."""
    namespace = {"__name__": module, "error": error}
    exec("def run(arguments):\n    raise error", namespace)
    run: Callable[[list[str]], None] = namespace["run"]  # type: ignore[assignment]  # defined by the line above
    return run


@pytest.mark.parametrize(
    "error", [ValueError("bad\n  value"), FileNotFoundError("bad value"), FloatingPointError("bad value")]
)
def test_our_errors_are_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", raising(error, "lightning_mixcn.data.anything"))
    assert cli.main(["fit"]) == 2
    assert capsys.readouterr().err == "mixcn: error: bad value (MIXCN_TRACEBACK=1 shows the traceback)\n"


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_TRACEBACK", "1")
    monkeypatch.setattr(cli, "_run", raising(ValueError("bad"), "lightning_mixcn.data.anything"))
    with pytest.raises(ValueError, match="bad"):
        cli.main(["fit"])


@pytest.mark.parametrize(
    ("error", "module"), [(ValueError("bad"), "torch.nn"), (RuntimeError("bad"), "lightning_mixcn.model.nf4.codec")]
)
def test_other_errors_keep_their_traceback(error: Exception, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_run", raising(error, module))
    with pytest.raises(type(error), match="bad"):
        cli.main(["fit"])


def test_errors_of_constructors_are_taken_out_of_jsonargparse_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrapped(arguments: list[str]) -> None:
        try:
            raising(ValueError("`sequence_length=0`"), "lightning_mixcn.data.pretrain")(arguments)
        except ValueError as cause:
            error = ValueError("Does not validate against any of the Union subtypes")
            error.__cause__ = cause
            raising(error, "jsonargparse._typehints")(arguments)

    monkeypatch.setattr(cli, "_run", wrapped)
    assert cli.main(["fit"]) == 2
    assert capsys.readouterr().err.startswith("mixcn: error: `sequence_length=0` (MIXCN")


def test_a_lost_loader_worker_is_one_line_and_no_fault_of_the_user_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    monkeypatch.setattr(cli, "_run", raising(killed, "torch.utils.data._utils.signal_handling"))
    assert cli.main(["fit"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mixcn: error: DataLoader worker (pid 7) is killed by signal: Killed. It may have run out")
    assert error.count("\n") == 1


def test_a_command_that_failed_has_said_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", raising(CommandFailed("`mixcn fit` ended with exit code 2"), "subprocess"))
    assert cli.main(["compare"]) == 2
    assert capsys.readouterr().err == "mixcn: error: `mixcn fit` ended with exit code 2\n"


def test_the_class_is_found_here() -> None:
    from lightning_mixcn.cli.trainer import MixcnCLI

    assert cli.MixcnCLI is MixcnCLI
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        cli.Nothing  # noqa: B018  # asking is the test


def test_what_the_package_logs_is_shown() -> None:
    program = (
        "import logging, sys; from lightning_mixcn import cli; cli._show_log(); cli._show_log(); "
        "logging.getLogger('lightning_mixcn.text.corpus.corpus').info('2 files read'); "
        "logging.getLogger('other').info('x')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "2 files read\n")

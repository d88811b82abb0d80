"""The steps with a stand-in for ``mixcn``; nothing is downloaded."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from lightning_mixcn.demo import base, fetch, instruct
from tests.demo.stand_in import FACTS, SOURCES, Mixcn


class Tuning(Mixcn):
    """Writes what an instruction tuning writes."""

    def fit(self, arguments: list[str]) -> None:
        instruct.RUN.mkdir(parents=True, exist_ok=True)
        better = {name: result | {"bits_per_byte": 2.0} for name, result in SOURCES.items()}
        facts = FACTS | {"validations": [{"step": 7, "sources": better}]}
        (instruct.RUN / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        ended = [(0, False), (0, True), (0, False), (0, False), (7, True), (7, True), (7, True), (7, False)]
        lines = [json.dumps({"step": step, "ended": how, "question": "问", "answer": "答"}) for step, how in ended]
        (instruct.RUN / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def chat(self, arguments: list[str]) -> None:
        assert arguments[0] == str(instruct.RUN)


@pytest.fixture
def tuning(mixcn: Mixcn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tuning:
    archive = tmp_path / "instructions.tar.gz"
    with tarfile.open(archive, "w:gz") as members:
        for language in ("zh", "en"):
            content = json.dumps([{"instruction": language, "output": "o"}]).encode()
            member = tarfile.TarInfo(f"llamafactory-0.9.5/data/alpaca_{language}_demo.json")
            member.size = len(content)
            members.addfile(member, io.BytesIO(content))
    files = fetch.fetch(Path(), []) | {fetch.INSTRUCTIONS.name: archive}
    monkeypatch.setattr(fetch, "fetch", lambda folder, packages: files)
    stand_in = Tuning()
    monkeypatch.setattr(base, "run_mixcn", stand_in)
    return stand_in


def test_all_steps_and_the_report(tuning: Tuning, capsys: pytest.CaptureFixture[str]) -> None:
    report = instruct.run_instruct_demo()
    commands = [call[0] for call in tuning.calls]
    assert commands == ["upcycle", "quantize", "validate", "validate", "fit", "validate", "chat", "chat"]
    assert tuning.typed[-2:] == [f"{question}\n" for question in instruct._QUESTIONS]
    assert json.loads((instruct.INSTRUCTIONS / "zh.json").read_text(encoding="utf-8"))[0]["instruction"] == "zh"
    assert report["bits_per_byte"]["zh"] == {"before": 2.5, "after": 2.0}
    assert report["bits_per_byte"]["en_text"] == {"before": 2.5, "after": 2.5}
    assert report["eos_rate"] == {"before": 0.25, "after": 0.75}
    assert json.loads((instruct.RUN / "report.json").read_text(encoding="utf-8")) == report
    out = capsys.readouterr().out
    assert out.index("141 MB") < out.index("[1/9]")  # said before it starts
    assert "[9/9]" in out
    assert "Chinese answers, held out   2.500  2.000  -20.0 %" in out
    assert "answers that end  25 % before, 75 % after" in out


def test_the_base_is_shared_with_the_other_demo(tuning: Tuning) -> None:
    instruct.run_instruct_demo()
    tuning.calls.clear()
    instruct.run_instruct_demo()
    assert [call[0] for call in tuning.calls][:2] == ["validate", "validate"]

"""From filled-in sheets to pairs that `PreferenceDataModule` reads."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.cli import main
from lightning_mixcn.data import PreferenceDataModule
from lightning_mixcn.studies.preference.matches import LEFT, RIGHT, TIE
from lightning_mixcn.studies.preference.pairs import majority
from lightning_mixcn.testing import save_tiny_mixtral
from lightning_mixcn.text import PreferenceSource, Turn

MODELS = ["base", "tuned"]
# The texts of both models, by question.
TEXTS = [("一", "二"), ("三", "四"), ("五", "六"), ("同", "同 "), ("", "七"), ("八", "九"), ("十", "百")]
SYSTEM = {"role": "system", "content": "用中文。"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write key and answers of seven questions, the first one with a system prompt; sides are in turn."""
    sides = [(0, 1) if number % 2 == 0 else (1, 0) for number in range(len(TEXTS))]
    items = [
        {"name": f"p-{number}", "question": number, "left": left, "right": right}
        for number, (left, right) in enumerate(sides)
    ]
    (tmp_path / "key.json").write_text(json.dumps({"models": MODELS, "items": items}), encoding="utf-8")
    lines = [
        {"model": model, "number": number, "question": "as shown", "messages": prompt(number), "text": text}
        for number, texts in enumerate(TEXTS)
        for model, text in zip(MODELS, texts, strict=True)
    ]
    write_answers(tmp_path, lines)
    return tmp_path


def prompt(number: int) -> list[dict[str, str]]:
    return [SYSTEM] * (number == 0) + [{"role": "user", "content": f"问{number}"}]


def write_answers(folder: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def sheet(folder: Path, judge: str, verdicts: str) -> str:
    """Write a sheet: a letter an item, l, r or t, and - where there is no verdict."""
    words = {"l": "left", "r": "right", "t": "tie", "-": ""}
    lines = "".join(f"p-{number},{words[letter]}\n" for number, letter in enumerate(verdicts))
    (folder / f"{judge}.csv").write_text("item,verdict\n" + lines, encoding="utf-8")
    return str(folder / f"{judge}.csv")


def run(out: Path, *sheets: str) -> int:
    return main(["preference", "pairs", *sheets, "--out", str(out)])


def test_what_most_judges_prefer_becomes_a_pair(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheets = [
        sheet(folder, "anna", "lltllr-"),
        sheet(folder, "bo", "lrtll--"),
        sheet(folder, "cid", "rl-lrt-"),
    ]
    out = folder / "pairs.jsonl"
    assert run(out, *sheets) == 0
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert found == [
        {
            "prompt": prompt(0), "chosen": "一", "rejected": "二", "chosen_model": "base", "rejected_model": "tuned",
            "item": "p-0", "judges": {"anna": "chosen", "bo": "chosen", "cid": "rejected"},
        },
        {
            "prompt": prompt(1), "chosen": "四", "rejected": "三", "chosen_model": "tuned", "rejected_model": "base",
            "item": "p-1", "judges": {"anna": "chosen", "bo": "rejected", "cid": "chosen"},
        },
    ]  # fmt: skip
    told = capsys.readouterr().out
    assert told == (
        f"{out}: 2 pairs; left out: 1 ties, 1 with an empty answer, 1 with equal answers, 1 without a majority, "
        "1 without a verdict\n"
    )


def test_more_than_half_of_the_verdicts() -> None:
    for verdicts, side in (
        ([], None), ([LEFT], LEFT), ([RIGHT, RIGHT, LEFT], RIGHT), ([LEFT, RIGHT], None), ([TIE], None),
        ([LEFT, TIE], None), ([LEFT, LEFT, TIE], LEFT), ([LEFT, LEFT, TIE, RIGHT], None),
    ):  # fmt: skip
        assert majority(verdicts) == side, verdicts


def test_the_data_module_reads_them(folder: Path) -> None:
    out = folder / "pairs.jsonl"
    assert run(out, sheet(folder, "anna", "llrllrr")) == 0
    base = str(save_tiny_mixtral(folder / "model"))
    data = PreferenceDataModule(
        [PreferenceSource("judged", str(out))], val_sources=[PreferenceSource("judged", str(out))], tokenizer=base,
        sequence_length=192, num_workers=0,
    )  # fmt: skip
    data.setup("fit")
    (conversations,) = data.evaluation_conversations("val")
    assert len(conversations) == 5
    assert conversations[0] == [Turn("system", "用中文。"), Turn("user", "问0"), Turn("assistant", "一")]
    batch = next(iter(data.train_dataloader()))
    assert {1, -1} <= set(batch["sides"].flatten().tolist())


def test_what_is_refused_is_one_line_with_file_and_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged, lines, out = sheet(folder, "anna", "llrllrr"), answers(folder), folder / "pairs.jsonl"
    old = [{name: value for name, value in line.items() if name != "messages"} for line in lines]
    other = [line | ({"messages": prompt(5)} if place == 3 else {}) for place, line in enumerate(lines)]
    for content, message in (
        (lines[:2] + old[2:], "answers.jsonl' line 3: expected `model`, `number`, `messages` and `text`"),
        ([lines[0] | {"text": 3}, *lines[1:]], "answers.jsonl' line 1: expected"),
        ([lines[0] | {"messages": []}, *lines[1:]], "answers.jsonl' line 1: expected"),
        ([*lines, lines[1]], "answers.jsonl' lines 2 and 15 both answer question 0 as 'tuned'"),
        (lines[1:], "has no answer of 'base' to question 0, which the key names"),
        (other, "'tuned' and 'base' were not asked the same as question 1"),
    ):
        write_answers(folder, content)
        assert run(out, judged) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (folder / "answers.jsonl").write_text("{\n", encoding="utf-8")
    assert run(out, judged) == 2
    assert "answers.jsonl' line 1: expected" in capsys.readouterr().err
    (folder / "answers.jsonl").unlink()
    assert run(out, judged) == 2
    assert "is no file. It is in the folder of `mixcn preference sheet`" in capsys.readouterr().err
    write_answers(folder, lines)
    assert run(out, sheet(folder, "bo", "ttttttt")) == 2
    assert "the sheets give no pair to train on (0 pairs; left out: 7 ties)" in capsys.readouterr().err
    assert not out.exists()
    out.write_text("mine", encoding="utf-8")
    assert run(out, judged) == 2
    assert "is a file, expected a new one" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "mine"

"""`mixcn preference`: from questions to Elo, killed and restarted, and bad input."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.cli import main
from lightning_mixcn.studies.parts import StudyParts
from lightning_mixcn.studies.preference.sheet import printable
from lightning_mixcn.studies.tables import FORMULA_STARTS
from lightning_mixcn.testing import save_tiny_mixtral, save_tiny_model

QUESTIONS = "你好？\n=1+1 <b>\nOnce upon a time\nWho are you?\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(save_tiny_mixtral(folder / name, seed=seed, initializer_range=0.3)) for seed, name in enumerate("abc")]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / "questions.txt").write_text(QUESTIONS, encoding="utf-8")
    return tmp_path / "questions.txt"


def sheet(models: list[str], questions: Path, out: Path, *more: str) -> list[str]:
    named = ["--questions", str(questions), "--out", str(out)]
    return ["preference", "sheet", *models, *named, "--device=cpu", "--max_new_tokens=5", *more]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        return list(csv.DictReader(opened))


def save_as_spreadsheets_do(file: Path, rows: list[dict[str, str]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_sheet_and_key_and_score(
    models: list[str], questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge who always prefers the first model to the second, and the second to the third, on either side."""
    out = tmp_path / "out"
    assert main(sheet(models, questions, out, "--dtype=float32")) == 0
    assert sorted(contents(out)) == ["answers.jsonl", "key.json", "sheet.csv", "sheet.html"]
    rows, key = rows_of(out / "sheet.csv"), json.loads((out / "key.json").read_text(encoding="utf-8"))
    answers = {
        (answer["model"], answer["question"]): answer["text"]
        for answer in map(json.loads, (out / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    }
    assert len(answers) == 3 * 4
    assert len(rows) == 3 * 4
    for row, item in zip(rows, key["items"], strict=True):
        question = QUESTIONS.splitlines()[item["question"]]
        assert row["item"] == item["name"]
        assert row["question"] == ("'" + question if question.startswith("=") else question)
        for side in ("left", "right"):
            text = printable(answers[models[item[side]], question])
            assert row[side] == (f"'{text}" if text.startswith(tuple(FORMULA_STARTS)) else text)
    for blind in ("sheet.csv", "sheet.html"):
        content = (out / blind).read_text(encoding="utf-8")
        assert not [name for name in models if name in content]
    for row, item in zip(rows, key["items"], strict=True):
        row["verdict"] = "tie" if item["question"] == 0 else "left" if item["left"] < item["right"] else "right"
    for judge in ("anna", "bo"):
        save_as_spreadsheets_do(tmp_path / f"{judge}.csv", rows)
    capsys.readouterr()
    filled = [str(tmp_path / f"{judge}.csv") for judge in ("anna", "bo")]
    assert (
        main(["preference", "score", *filled, "--out", str(tmp_path / "scores"), "--key", str(out / "key.json")]) == 0
    )
    assert "87.5%" in capsys.readouterr().out
    report = json.loads((tmp_path / "scores" / "preference.json").read_text(encoding="utf-8"))
    assert [pair["score"] for pair in report["pairs"]] == [0.875] * 3
    elo = [model["elo"] for model in report["models"]]
    assert elo[0] == 1000
    assert elo[1] - elo[2] == pytest.approx(elo[0] - elo[1])
    share = sum({"left": 1.0, "tie": 0.5, "right": 0.0}[row["verdict"]] for row in rows) / len(rows)
    assert [side["left"] for side in report["judges"]] == [share] * 3
    assert report["agreement"]["cohen_kappa"] == 1
    pairs = tmp_path / "pairs.jsonl"
    assert main(["preference", "pairs", *filled, "--out", str(pairs), "--key", str(out / "key.json")]) == 0
    for record in map(json.loads, pairs.read_text(encoding="utf-8").splitlines()):
        question = record["prompt"][-1]["content"]
        assert record["chosen"] == answers[record["chosen_model"], question]
        assert models.index(record["chosen_model"]) < models.index(record["rejected_model"])
    assert "left out: 3 ties" in capsys.readouterr().out


def test_models_of_other_families(questions: Path, tmp_path: Path) -> None:
    families = ("olmoe", "qwen3_moe")
    models = [
        save_tiny_model(tmp_path / family, family, num_experts=16, num_experts_per_tok=4, initializer_range=0.3)
        for family in families
    ]
    assert main(sheet([str(model) for model in models], questions, tmp_path / "out")) == 0
    rows = rows_of(tmp_path / "out" / "sheet.csv")
    assert len(rows) == len(QUESTIONS.splitlines())
    assert all(row["left"] and row["right"] for row in rows)


def test_killed_and_restarted_it_writes_the_same(
    models: list[str],
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, resumed = (sheet(models[:2], questions, tmp_path / name / "out", "--temperature=1") for name in ("w", "r"))
    assert main(whole) == 0
    save: Any = StudyParts.save
    saved: list[str] = []

    def dying(self: StudyParts, name: str, arrays: Any) -> None:
        if len(saved) in (1, 5) and name not in dead:
            dead.append(name)
            raise KeyboardInterrupt
        save(self, name, arrays)
        saved.append(name)

    dead: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(StudyParts, "save", dying)
        for _ in range(2):
            assert main(resumed) == 130
            assert [path.name for path in (tmp_path / "r").iterdir()] == [".out.unfinished"]
        assert main(resumed) == 0
    assert len(saved) == len(set(saved)) == 2 * 4
    assert contents(tmp_path / "r" / "out") == contents(tmp_path / "w" / "out")
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["out"]
    capsys.readouterr()
    assert main(resumed) == 0
    assert "was finished before" in capsys.readouterr().err
    assert main([*resumed, "--seed=1"]) == 2
    assert "`seed=0`, but now it is 1" in capsys.readouterr().err


def test_drawn_questions_are_answered_alone(models: list[str], questions: Path, tmp_path: Path) -> None:
    assert main(sheet(models, questions, tmp_path / "out", "--questions_per_pair=1")) == 0
    assert len(rows_of(tmp_path / "out" / "sheet.csv")) == 3
    answered = (tmp_path / "out" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert 3 <= len(answered) <= 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--quantization=int8"], "`quantization='int8'`"),
        (["--dtype=int8"], "`dtype='int8'`"),
        (["--device=abacus"], "`device='abacus'`"),
        (["--questions_per_pair=0"], "`questions_per_pair=0`"),
        (["--top_p=2"], "`top_p=2"),
        (["--questions=nowhere.txt"], "`questions='nowhere.txt'` is no file"),
        (["--template=tokenizer"], "has no chat template"),
        (["--template=nowhere.jinja"], "`template='nowhere.jinja'` is not there"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    models: list[str],
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    assert main(sheet(models[:2], questions, tmp_path / "out", *changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [questions]


def test_bad_models_and_sheets(
    models: list[str], questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four_bits = tmp_path / "four"
    assert main(["quantize", models[0], str(four_bits)]) == 0
    capsys.readouterr()
    for given, message in (
        (models[:1], "Give at least two models"),
        ([models[0], models[0]], "twice. Leave one out"),
        ([models[0], "nowhere"], "'nowhere' is not there"),
        ([models[0], str(four_bits), "--quantization=none"], "is in 4 bits. Use nf4, or the original"),
    ):
        assert main(sheet(given, questions, tmp_path / "out")) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "key.json").write_text('{"models": ["a", "b"], "items": []}', encoding="utf-8")
    (tmp_path / "judge.csv").write_text("item,verdict\np-1,good\n", encoding="utf-8")
    assert main(["preference", "score", str(tmp_path / "judge.csv"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "judge.csv' row 2: the verdict 'good' is not known. Expected one of left, right, tie" in error
    assert not (tmp_path / "out").exists()


def test_help_says_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["preference", "sheet", "--help"])
    assert end.value.code == 0
    assert "The cost is one forward pass of one token" in " ".join(capsys.readouterr().out.split())

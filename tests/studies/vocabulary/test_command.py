"""`mixcn vocab train | merge | report` as a person types them: one after the other, and what they refuse."""

import json
from pathlib import Path

import pytest

from lightning_mixcn.cli import main
from lightning_mixcn.text import load_tokenizer
from tests.extended_tokenizers import CYRILLIC, HAN
from tests.studies.vocabulary.vocab_data import small_base


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder to work in, with a base, a Chinese and a Russian text."""
    monkeypatch.chdir(tmp_path)
    small_base(tmp_path / "base")
    lines = [{"text": "".join(HAN[number % 5 :]) + "。"} for number in range(60)]
    Path("zh.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    Path("ru a.txt").write_text("\n".join(" ".join(CYRILLIC[number % 5 :]) for number in range(60)), encoding="utf-8")
    return tmp_path


def test_the_three_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["vocab", "train", "zh.jsonl", "ru a.txt", "--vocab_size", "150", "--character_coverage=1.0"]
    assert main([*train, "--out", "models/pieces.model"]) == 0
    assert "147 pieces, such as" in capsys.readouterr().err
    assert main([*train, "--out=again.model"]) == 0
    assert Path("models/pieces.model").read_bytes() == Path("again.model").read_bytes()
    merge = ["vocab", "merge", "base", "models/pieces.model", "--out"]
    assert main([*merge, "zh", "--max_pieces", "40"]) == 0
    assert main([*merge, "both", "--script", "Han+Cyrillic"]) == 0
    said = capsys.readouterr().out
    assert "of another script than Han, left out" in said
    assert "added in all: 370 → 410" in said
    report = ["vocab", "report", "base", "both", "--text", "zh=zh.jsonl", "ru=ru a.txt", "--out", "counted"]
    assert main(report) == 0
    table = capsys.readouterr().out
    assert Path("counted/vocabulary.txt").read_text(encoding="utf-8") == table
    records = json.loads(Path("counted/vocabulary.json").read_text(encoding="utf-8"))
    assert [(record["tokenizer"], record["source"]) for record in records] == [
        ("base", "zh"), ("both", "zh"), ("base", "ru"), ("both", "ru"),
    ]  # fmt: skip
    for old, new in (records[:2], records[2:]):
        assert new["characters_per_token"] > 2 * old["characters_per_token"]
        assert new["byte_fallback_share"] < old["byte_fallback_share"]
    assert Path("counted/vocabulary.csv").read_text(encoding="utf-8").count("\n") == 5
    assert load_tokenizer("both").vocab_size == records[1]["pieces"]
    assert not list(here.glob(".*"))


def test_help_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        ([], "merge"),
        (["train"], "--character_coverage"),
        (["merge"], "--script"),
        (["report"], "--text"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["vocab", *arguments, "--help"])
        assert stopped.value.code == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], 'expected "subcommand" to be one of {train,merge,report}'),
        (["split"], "invalid choice: 'split'"),
        (["train", "--out", "x.model"], "corpus"),
        (["train", "zh.jsonl", "--out", "base"], "is a folder, expected a new file"),
        (["train", "zh.jsonl", "--out", "x", "--vocab_size", "9000"], "Vocabulary size too high"),
        (["train", "zh.jsonl", "--out", "x", "--vocab_size", "3"], "`vocab_size=3`: expected at least 4"),
        (["train", "zh.jsonl", "--out", "x", "--character_coverage", "0.5"], "expected at least 0.98"),
        (["train", "zh.jsonl", "--out", "x", "--max_sentences", "50"], "expected more than 100"),
        (["train", "zh.jsonl", "--out", "x", "--model_type", "word"], "model_type"),
        (["train", "zh.jsonl", "--out", "x", "--text_key", "body"], "line 1 has no key 'body'"),
        (["train", "none.jsonl", "--out", "x"], "`corpus.path='none.jsonl'` matches no file"),
        (["merge", "base", "zh.jsonl", "--out", "x"], "`pieces='zh.jsonl'` is not a SentencePiece model"),
        (["merge", "base", "none.model", "--out", "x"], "`pieces='none.model'` is not there"),
        (["merge", "base", "base", "--out", "x"], "`pieces` has nothing new"),
        (["merge", "base", "base", "--out", "base"], "is a folder that is not empty"),
        (["merge", "base", "base", "--out", "x", "--script", "Klingon"], "Unicode has no script 'Klingon'"),
        (["merge", "base", "base", "--out", "x", "--max_pieces", "0"], "`max_pieces=0`: expected at least 1"),
        (
            ["merge", "nowhere", "base", "--out", "x"],
            "Give a folder with tokenizer.json or tokenizer.model, or a hub id",
        ),
        (["report", "base", "--text", "zh.jsonl"], "expected name=PATH"),
        (["report", "base", "--text", "zh=none.jsonl"], "matches no file"),
        (
            ["report", "nowhere", "--text", "zh=zh.jsonl"],
            "'nowhere' is not there. Give a folder with tokenizer.json or",
        ),
        (
            ["report", ".", "--text", "zh=zh.jsonl"],
            "has neither tokenizer.json nor tokenizer.model. Give the folder of a",
        ),
        (["report", "run", "--text", "zh=zh.jsonl"], "tokenizer.model. Give 'run/adapter', the run's adapter, or"),
        (["report", "zh.jsonl", "--text", "zh=zh.jsonl"], "`tokenizer='zh.jsonl'` is not a SentencePiece model"),
        (["report", "base", "--text", "zh=zh.jsonl", "--out", "base"], "is a folder that is not empty"),
        (["report", "base", "--text", "zh=zh.jsonl", "--max_documents", "0"], "expected at least 1"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "run").mkdir()
    (here / "run" / "adapter").symlink_to(here / "base")
    before = sorted(here.rglob("*"))
    assert main(["vocab", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(here.rglob("*")) == before

"""`mixcn data`: planted copies and questions, killed and restarted, and bad input."""

import gzip
import importlib.util
import json
import random
from pathlib import Path

import pytest

from lightning_mixcn.cli import main
from lightning_mixcn.studies.hygiene import scan
from lightning_mixcn.studies.parts import Arrays, StudyParts

from .planting import plant, recall_and_precision, removed

SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_minhash = pytest.mark.skipif(importlib.util.find_spec("rensa") is None, reason="needs the extra `data`")
PLAIN = ["--max_changed", "0"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Draw documents of words and of Chinese characters, as unevenly as in a language."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(5000)]
    characters = [chr(0x4E00 + place) for place in range(4000)]
    weights = [1 / rank for rank in range(1, 5001)]
    documents = []
    for number in range(count):
        if number % 2:
            documents.append(" ".join(draw.choices(words, weights, k=draw.randint(60, 300))) + ".")
        else:
            documents.append("".join(draw.choices([*characters, "，", "。"], weights[:4002], k=draw.randint(100, 600))))
    return documents


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def kept(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@needs_minhash
def test_what_was_planted_is_found(tmp_path: Path) -> None:
    documents, questions = texts(450), [text[:120] for text in texts(40, seed=1)]
    planted = plant(tmp_path / "a.jsonl", documents, questions)
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"question": text}) + "\n" for text in questions), encoding="utf-8")
    assert main(["data", "clean", str(planted.path), "--out", str(tmp_path / "out"), "--against", str(asked)]) == 0
    recall, precision = recall_and_precision(planted, tmp_path / "out")
    assert (min(recall.values()), precision) >= (0.98, 0.98)
    gone = removed(tmp_path / "out")
    assert {gone[line]["reason"] for line in planted.lines["question"]} == {"question"}
    copies = [gone[line] for line in planted.lines["changed"] if line in gone]
    assert all(record["duplicate_of"]["line"] <= 450 and 0.05 < record["value"] < 0.17 for record in copies)
    assert kept(tmp_path / "out" / "kept" / "text.jsonl")[:450] == documents


@needs_minhash
@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "corpora").exists(), reason="needs the corpora of shared/")
def test_what_was_planted_in_real_text_is_found(tmp_path: Path) -> None:
    documents = list[str]()
    for name in ("zh/wikipedia_paragraphs", "en/wikipedia_vital_summaries", "zh/tech_docs"):
        packed = (SHARED / "corpora" / f"{name}.jsonl.gz").read_bytes()
        lines = gzip.decompress(packed).splitlines()[:2000]
        documents += [text for line in lines if len(text := json.loads(line)["text"]) > 100]
    asked = SHARED / "eval" / "gsm8k_test.jsonl"
    questions = [json.loads(line)["question"] for line in asked.read_text(encoding="utf-8").splitlines()[:300]]
    planted = plant(tmp_path / "a.jsonl", documents, questions)
    assert main(["data", "report", str(planted.path), "--out", str(tmp_path / "out"), "--against", str(asked)]) == 0
    recall, precision = recall_and_precision(planted, tmp_path / "out")
    print(len(documents), {kind: len(lines) for kind, lines in planted.lines.items()}, recall, precision)
    assert min(recall.values()) >= 0.95
    assert precision >= 0.95


@pytest.mark.parametrize("options", [PLAIN, pytest.param([], marks=needs_minhash)])
def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.setattr(scan, "_PART_DOCUMENTS", 10)
    planted = plant(tmp_path / "a.jsonl", texts(45), [])
    command = ["data", "clean", str(planted.path), *options, "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    save, saved = StudyParts.save, list[str]()

    def save_three(self: StudyParts, name: str, arrays: Arrays) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(name)
        save(self, name, arrays)

    monkeypatch.setattr(StudyParts, "save", save_three)
    assert main([*command, str(tmp_path / "killed")]) == 130
    assert not (tmp_path / "killed").exists()

    def save_all(self: StudyParts, name: str, arrays: Arrays) -> None:
        saved.append(name)
        save(self, name, arrays)

    monkeypatch.setattr(StudyParts, "save", save_all)
    assert main([*command, str(tmp_path / "killed")]) == 0
    assert len(saved) == len(set(saved)) == 6
    for file in ("kept/text.jsonl", "removed.jsonl", "report.html", "report.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not [path for path in tmp_path.glob(".*") if path.is_dir()]


def test_the_first_reason_counts(tmp_path: Path) -> None:
    documents = [
        "12 345 678 a", "<b>x</b> &amp; a", "ab\ufffd\ufffdcd", "Только русский язык", "short", "Equal text, once.",
        "equal TEXT once", "!!!", "???", "另一段文字，足够长。",
    ]  # fmt: skip
    source = write(tmp_path / "a.jsonl", documents)
    limits = ["--min_letters", "4", "--max_digits=0.5", "--max_markup=0.4", "--max_replaced=0.1"]
    command = ["data", "clean", str(source), "--out", str(tmp_path / "out"), "--scripts", "Han+Latin", *limits, *PLAIN]
    assert main(command) == 0
    reasons = {line: record["reason"] for line, record in removed(tmp_path / "out").items()}
    assert reasons == {
        1: "digits", 2: "markup", 3: "replaced", 4: "scripts", 7: "exact", 8: "letters", 9: "letters"
    }  # fmt: skip
    assert removed(tmp_path / "out")[7]["duplicate_of"]["line"] == 6
    summary = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["sources"]["text"]
    assert (summary["documents"], summary["kept_documents"]) == (10, 3)
    assert summary["replaced"] == 2


def test_the_sources_of_a_run(tmp_path: Path) -> None:
    for name, text in (("zh", "中文一。"), ("en", "English one.")):
        packed = gzip.compress((json.dumps({"body": text}) + "\n").encode() * 2)
        (tmp_path / f"{name}.jsonl.gz").write_bytes(packed)
    entries = [{"name": name, "path": str(tmp_path / f"{name}.jsonl.gz"), "text_key": "body"} for name in ("zh", "en")]
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps({"data": {"class_path": "PretrainDataModule", "init_args": {"sources": entries}}}))
    assert main(["data", "clean", str(run), "--out", str(tmp_path / "out"), *PLAIN]) == 0
    written = {path.name: gzip.decompress(path.read_bytes()) for path in (tmp_path / "out" / "kept").iterdir()}
    assert {name: json.loads(text) for name, text in written.items()} == {
        "zh.jsonl.gz": {"body": "中文一。"}, "en.jsonl.gz": {"body": "English one."}
    }  # fmt: skip


def test_the_page_shows_text_and_no_secret(tmp_path: Path) -> None:
    token = "hf_" + "a" * 30
    source = write(tmp_path / "a.jsonl", [f"<script>alert(1)</script> 文 {token}"] * 2)
    assert main(["data", "report", str(source), "--out", str(tmp_path / "out"), *PLAIN]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 文" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert not any(token in file.read_text(encoding="utf-8") for file in (tmp_path / "out").iterdir())


def test_questions_of_csv(tmp_path: Path) -> None:
    question = "一个长方形的长是八厘米宽是五厘米求它的面积"
    (tmp_path / "q.csv").write_text(f"id,question\n1,{question}？\n", encoding="utf-8-sig")
    source = write(tmp_path / "a.jsonl", ["没有问题的文字", f"序。{question}。答案是四十。"])
    out = tmp_path / "out"
    assert main(["data", "report", str(source), "--out", str(out), "--against", str(tmp_path / "q.csv"), *PLAIN]) == 0
    assert removed(out)[2]["question"] == f"{tmp_path / 'q.csv'}:2"
    assert json.loads((out / "overlaps.jsonl").read_text(encoding="utf-8"))["share"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{source}", "--scripts", "Klingon", *PLAIN], "`scripts='Klingon'`: expected Han, Kana"),
        (["{source}", "--max_changed", "0.5"], "`max_changed=0.5`: expected at most 0.2"),
        (["{folder}/none.yaml", *PLAIN], "is no file. Give the YAML of a run"),
        (["{folder}/empty.yaml", *PLAIN], "has no `data.init_args.sources`"),
        (["{source}", "--against", "{folder}/empty.csv", *PLAIN], "has no column 'question'. Set `question_key`"),
    ],
)
def test_what_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    source = write(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "empty.yaml").write_text("data: {}\n", encoding="utf-8")
    (tmp_path / "empty.csv").write_text("id\n1\n", encoding="utf-8")
    given = [argument.format(source=source, folder=tmp_path) for argument in arguments]
    assert main(["data", "report", *given, "--out", str(tmp_path / "out")]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_library(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rensa" else find(name))
    source = write(tmp_path / "a.jsonl", ["text"])
    assert main(["data", "report", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'lightning_mixcn[data]'" in capfd.readouterr().err

"""Benchmark data: hub layout, official releases, and nothing from the network."""

import csv
import io
import json
import socket
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.studies.task_files import BenchmarkFiles
from tests.studies.benchmark_data import HARNESS_WARNINGS, real_files, write_ceval

pytestmark = pytest.mark.filterwarnings(HARNESS_WARNINGS)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def load(folder: Path, dataset: str, configuration: str) -> Any:
    import datasets

    with BenchmarkFiles(folder).in_place_of_hub():
        return datasets.load_dataset(dataset, configuration)


def test_ceval_is_what_its_archive_holds(tmp_path: Path) -> None:
    found = load(real_files(), "ceval/ceval-exam", "law")
    with zipfile.ZipFile(real_files() / "ceval.zip") as archive:
        text = archive.read("val/law_val.csv").decode("utf-8-sig")
    expected = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [{name: row[name] for name in expected[0]} for row in found["val"]] == expected
    assert set(found) == {"dev", "val", "test"}
    assert set(found["test"]["answer"]) == {""}


def test_cmmlu_and_mmlu_are_found_in_their_archives(tmp_path: Path) -> None:
    cmmlu = load(real_files(), "haonan-li/cmmlu", "agronomy")
    assert (len(cmmlu["dev"]), len(cmmlu["test"])) == (5, 169)
    assert cmmlu["test"][0]["Answer"] == "B"
    mmlu = load(real_files(), "cais/mmlu", "anatomy")
    assert (len(mmlu["dev"]), len(mmlu["validation"]), len(mmlu["test"])) == (5, 14, 135)
    row = mmlu["test"][0]
    assert row["subject"] == "anatomy"
    assert row["choices"][row["answer"]] == "paralysis of the facial muscles."


def test_a_folder_of_csv_files_serves_as_well(tmp_path: Path) -> None:
    found = load(write_ceval(tmp_path), "ceval/ceval-exam", "accountant")
    assert len(found["val"]) == 40
    assert all(isinstance(row["A"], str) for row in found["val"])  # "37" stays text


def test_jsonl_releases(tmp_path: Path) -> None:
    lines = [{"question": "1\u2028+1?", "answer": "#### 2"}, {"question": "2+2?", "answer": "#### 4"}]
    for split in ("train", "test"):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (tmp_path / f"gsm8k_{split}.jsonl").write_text(text, encoding="utf-8")
    assert load(tmp_path, "openai/gsm8k", "main")["test"].to_list() == lines


@pytest.mark.parametrize("name", ["xcopa_zh_{}.jsonl", "{}.zh.jsonl", "xcopa/data/zh/{}.zh.jsonl"])
def test_xcopas_chinese(tmp_path: Path, name: str) -> None:
    row = {
        "premise": "水。",
        "choice1": "a",
        "choice2": "b",
        "question": "effect",
        "label": 1,
        "idx": 0,
        "changed": False,
    }
    for split in ("val", "test"):
        file = tmp_path / name.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    found = load(tmp_path, "cambridgeltl/xcopa", "zh")
    assert found["validation"].to_list() == found["test"].to_list() == [row]


def test_hub_layout_comes_first(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    folder = tmp_path / "openai" / "gsm8k"
    (folder / "main").mkdir(parents=True)
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), folder / "main" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test-*\n---\n",
        encoding="utf-8",
    )
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "other", "answer": "a"}\n', encoding="utf-8")
    assert load(tmp_path, "openai/gsm8k", "main")["test"]["question"] == ["q"]


def test_changed_files_are_converted_anew(tmp_path: Path) -> None:
    file = tmp_path / "gsm8k_test.jsonl"
    for question in ("one", "two or three"):
        file.write_text(json.dumps({"question": question, "answer": "a"}) + "\n", encoding="utf-8")
        assert load(tmp_path, "openai/gsm8k", "main")["test"]["question"] == [question]


def test_everything_is_as_before_afterwards(tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import constants

    before = datasets.load_dataset, constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with BenchmarkFiles(tmp_path).in_place_of_hub():
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert before == (datasets.load_dataset, constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`data_dir='nowhere'` is not a folder"):
        BenchmarkFiles("nowhere")
    with pytest.raises(FileNotFoundError, match=r"no dataset cais/mmlu\. Expected .*mmlu\.zip"):
        BenchmarkFiles(tmp_path).find("cais/mmlu")
    with pytest.raises(FileNotFoundError, match=r"no dataset a/b\. Expected"):
        BenchmarkFiles(tmp_path).find("a/b")
    (tmp_path / "mmlu.zip").write_text("no archive")
    with pytest.raises(ValueError, match=r"mmlu\.zip' is not a zip archive"):
        BenchmarkFiles(tmp_path).find("cais/mmlu")
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(ValueError, match="test split of main is not as published"):
        BenchmarkFiles(tmp_path).find("openai/gsm8k")

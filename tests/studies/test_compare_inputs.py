import os
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.studies.comparison.run import check_inputs, files_fingerprint, fingerprint


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "run"):
        Path(name).mkdir()
        Path(name, "weights").write_bytes(b"1")
    for name in ("zh.jsonl", "en.jsonl"):
        Path(name).write_text("{}")
    sources = [{"name": name, "path": f"{name}.jsonl", "text_key": "text"} for name in ("zh", "en")]
    model = {"base": "base", "tokenizer": "prepared/longer", "adapter": "run"}
    return {"model": {"init_args": model}, "data": {"init_args": {"sources": sources, "val_sources": []}}}


def test_what_will_be_prepared_may_come(config: dict[str, Any]) -> None:
    check_inputs(config, Path("prepared"))


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("model", "base", "gone", "'gone' is not there"),
        ("model", "tokenizer", "longer", "'longer' is not there"),
        ("model", "adapter", "other", "'other' is not there"),
        (
            "data",
            "val_sources",
            [{"name": "zh", "path": "x*.jsonl", "text_key": "text"}],
            r"val_sources\[0\].*x\*.jsonl",
        ),
        ("data", "sources", [{"name": "zh", "path": "x.json", "records": None}], r"sources\[0\].*x.json"),
    ],
)
def test_what_is_not_there(part: str, name: str, value: Any, message: str, config: dict[str, Any]) -> None:
    config[part]["init_args"][name] = value
    with pytest.raises(FileNotFoundError, match=message):
        check_inputs(config, Path("prepared"))


def test_a_changed_file_changes_the_fingerprint(config: dict[str, Any]) -> None:
    before = fingerprint(config)
    assert set(before) == {"base", "run", "zh.jsonl", "en.jsonl"}
    assert fingerprint(config) == before
    Path("base", "weights").write_bytes(b"12")
    os.utime("zh.jsonl", ns=(0, 0))
    after = fingerprint(config)
    assert [path for path in before if before[path] != after[path]] == ["base", "zh.jsonl"]


def test_globs_and_what_is_elsewhere(config: dict[str, Any]) -> None:
    found = files_fingerprint(["*.jsonl", "gone", "s3://bucket/zh/*.parquet", "--vocab_size"])
    assert list(found) == ["*.jsonl"]


def test_linked_folders_are_seen(config: dict[str, Any]) -> None:
    Path("data").mkdir()
    Path("data/linked").symlink_to(Path("run").absolute())
    Path("data/circle").symlink_to(".")
    Path("data/gone").symlink_to("nowhere")
    before = files_fingerprint(["data"])
    Path("run/weights").write_bytes(b"12")
    assert files_fingerprint(["data"]) != before

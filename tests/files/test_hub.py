"""From a name to a folder; the hub is never reached from a test."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects

from lightning_mixcn.files.hub import local_folder


@pytest.fixture
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert local_folder(tmp_path) == tmp_path
    assert local_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "nothing", "a/b/c", "./a/b", "a b/c"])
def test_what_is_neither_a_folder_nor_a_hub_id(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not there\. Give a folder with config\.json"):
        local_folder(name)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(NotADirectoryError, match=r"a\.txt' is a file, expected a folder"):
        local_folder(tmp_path / "a.txt")


@pytest.mark.usefixtures("_offline")
def test_offline_says_to_give_a_local_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"'owner/name' is not a folder, .* Give a local folder") as caught:
        local_folder("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_offline")
def test_offline_takes_the_local_cache(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--owner--name"
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    assert local_folder("owner/name") == model / "snapshots" / commit


def test_only_safetensors_json_and_tokenizer_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_folder("owner/name") == tmp_path
    files = ["model.safetensors", "config.json", "tokenizer.model", "a.bin", "consolidated.00.safetensors", "run.py"]
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    kept = list(filter_repo_objects(files, **patterns))
    assert kept == ["model.safetensors", "config.json", "tokenizer.model"]


def test_unknown_hub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub_id: str, **_: Any) -> str:
        raise RepositoryNotFoundError("404\nmany\nlines", response=MagicMock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub model that can be read") as caught:
        local_folder("owner/name")
    assert "\n" not in str(caught.value)

"""The record of which base something was made from."""

from pathlib import Path

import pytest

from lightning_mixcn.model import base_identity
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.identity import (
    IDENTITY_FILE,
    check_made_from,
    read_identity,
    write_identity,
)
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.testing import save_tiny_mixtral


def test_a_base_is_recognised_after_moving_and_in_four_bits(tmp_path: Path) -> None:
    base, adapter = save_tiny_mixtral(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    write_identity(adapter, base_identity(Checkpoint(base)))
    assert read_identity(adapter) == base_identity(Checkpoint(base))
    moved = base.rename(tmp_path / "moved")
    check_made_from(adapter, Checkpoint(moved))
    quantize(str(moved), str(tmp_path / "small"))
    check_made_from(adapter, Checkpoint(tmp_path / "small"))
    other = save_tiny_mixtral(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"was made from the base .*base .*other is another one"):
        check_made_from(adapter, Checkpoint(other))


def test_without_a_record_there_is_nothing_to_check(tmp_path: Path) -> None:
    assert read_identity(tmp_path) is None
    check_made_from(tmp_path, Checkpoint(save_tiny_mixtral(tmp_path / "base")))


def test_a_broken_record(tmp_path: Path) -> None:
    (tmp_path / IDENTITY_FILE).write_text('{"path": 1}')
    with pytest.raises(
        ValueError, match=r"base_identity\.json': path is 1, expected text\. Copy it again, or delete it"
    ):
        read_identity(tmp_path)


def test_a_note_that_cannot_be_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache folder may be shared, and the note another person's."""
    monkeypatch.setenv("MIXCN_CACHE", str(tmp_path / "cache"))
    write_identity(tmp_path, base_identity(Checkpoint(save_tiny_mixtral(tmp_path / "base"))))
    (note,) = (file for file in (tmp_path / "cache").rglob("*") if file.is_file())
    note.write_bytes(b"\xff")
    assert (read_identity(tmp_path) or {})["path"] == "base"


def test_a_note_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a kill at the last one of a run would leave a hidden file that no later run of it removes."""
    monkeypatch.setenv("MIXCN_CACHE", str(tmp_path / "cache"))
    identity = base_identity(Checkpoint(save_tiny_mixtral(tmp_path / "base")))
    write_identity(tmp_path, identity)
    (note,) = (file for file in (tmp_path / "cache").rglob("*") if file.is_file())
    before = note.stat().st_ino
    write_identity(tmp_path, identity)
    assert note.stat().st_ino == before
    note.write_bytes(b"\xff")
    write_identity(tmp_path, identity)
    assert note.read_text(encoding="utf-8") == str(tmp_path / "base")


def test_what_a_kill_left_beside_a_note_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill came between the note and the end of its lock: no further writing of the note would remove it."""
    monkeypatch.setenv("MIXCN_CACHE", str(tmp_path / "cache"))
    identity = base_identity(Checkpoint(save_tiny_mixtral(tmp_path / "base")))
    write_identity(tmp_path, identity)
    (note,) = (file for file in (tmp_path / "cache").rglob("*") if file.is_file())
    for left in (".base.lock", ".base.partial", ".other.lock"):
        note.with_name(left).touch()
    write_identity(tmp_path, identity)
    assert {file.name for file in note.parent.iterdir()} == {"base", ".other.lock"}

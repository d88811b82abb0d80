"""Checkpoint folders are written whole or not at all, shard by shard."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_mixcn.files import atomic
from lightning_mixcn.model.checkpoints import writer as shard_writer
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.writer import new_checkpoint

CONFIG = {"model_type": "mixtral", "b": None, "a": [1]}


def numbered(count: int) -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.full((10,), float(i)) for i in range(count)}


def write(out: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 10**9) -> None:
    with new_checkpoint(out, CONFIG, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def test_small_model_is_one_file(tmp_path: Path) -> None:
    write(tmp_path / "out", numbered(3))
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {n: t.tolist() for n, t in numbered(3).items()}
    assert os.listdir(tmp_path) == ["out"]


def test_shards_have_final_names_and_an_index(tmp_path: Path) -> None:
    write(tmp_path / "out", numbered(5), max_shard_bytes=80)  # two tensors of 40 bytes fit exactly
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", *shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}
    assert [index["weight_map"][f"layer.{i}"] for i in range(5)] == [shards[i // 2] for i in range(5)]
    checkpoint = Checkpoint(tmp_path / "out")
    assert torch.equal(checkpoint.read("layer.4"), numbered(5)["layer.4"])


def test_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    write(tmp_path / "out", {"a": torch.zeros(2), "b": torch.zeros(100), "c": torch.zeros(2)}, max_shard_bytes=50)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


def test_a_full_shard_is_written_and_released_at_once(tmp_path: Path) -> None:
    with new_checkpoint(tmp_path / "out", CONFIG, max_shard_bytes=80) as writer:
        for i, tensor in enumerate(numbered(6).values()):
            writer.add(f"layer.{i}", tensor)
            assert writer.held_bytes <= 80
            assert len(list(writer.folder.glob("*.safetensors"))) == i // 2
        assert not (tmp_path / "out").exists()


def test_a_tensor_may_change_after_it_was_added(tmp_path: Path) -> None:
    reused = torch.zeros(4)
    with new_checkpoint(tmp_path / "out", CONFIG) as writer:
        for i in range(3):
            writer.add(f"layer.{i}", reused.fill_(i))
    assert [Checkpoint(tmp_path / "out").read(f"layer.{i}").tolist() for i in range(3)] == [[i] * 4 for i in range(3)]


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, numbered(5), max_shard_bytes=80)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_dtype_views_and_shared_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "t": base.t(),
        "same": base,
        "again": base,
        "half": base.bfloat16(),
        "codes": base.to(torch.uint8)[:, :3],
    }
    tensors |= {"scalar": torch.tensor(True), "empty": torch.empty(0, 3)}
    tensors["grad"] = torch.nn.Parameter(torch.ones(2))
    write(tmp_path / "out", tensors)
    checkpoint = Checkpoint(tmp_path / "out")
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.dtype(name) == tensor.dtype


def test_further_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with new_checkpoint(tmp_path / "out", CONFIG) as writer:
        writer.add("a", torch.zeros(1))
        writer.add_file(tmp_path / "tokenizer.json")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", numbered(1))
    write(tmp_path / "a" / "b" / "c", numbered(1))
    assert (tmp_path / "a" / "b" / "c" / "config.json").exists()


def test_folder_that_is_not_empty_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match=r"not empty\. Delete it or choose another output"):
        write(tmp_path / "out", {})
    with pytest.raises(FileExistsError, match="is a file"):
        write(tmp_path / "out" / "mine.txt", {})
    assert os.listdir(tmp_path) == ["out"]


def test_folder_that_fills_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def race() -> None:
        with new_checkpoint(tmp_path / "out", CONFIG) as writer:
            writer.add("a", torch.zeros(1))
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="not empty"):
        race()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with new_checkpoint(tmp_path / "out", CONFIG, max_shard_bytes=80) as writer:
            for name, tensor in numbered(5).items():
                writer.add(name, tensor)
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_after_an_error_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "flush_to_disk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", numbered(3))
    assert os.listdir(tmp_path) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, tensors: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writer, "write_safetensors", full)
    with pytest.raises(
        OSError, match=r"no space to write '.*out': No space left on device\. Free some space"
    ) as caught:
        write(tmp_path / "out", numbered(5), max_shard_bytes=80)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_disk_that_will_not_hold_it_is_refused_first(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with new_checkpoint(tmp_path / "out", CONFIG) as writer:
        writer.require_free_bytes(1)
        with pytest.raises(OSError, match=r"GB are needed, .* GB are free"):
            writer.require_free_bytes(2 * free + 10**12)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`max_shard_bytes` must be at least 1, not 0"):
        write(tmp_path / "out", {}, max_shard_bytes=0)
    with new_checkpoint(tmp_path / "out", CONFIG) as writer:
        writer.add("a", torch.zeros(1))
        with pytest.raises(ValueError, match="tensor 'a' was added twice"):
            writer.add("a", torch.zeros(1))
        with pytest.raises(ValueError, match=r"tensor 'b' has dtype torch\.complex64"):
            writer.add("b", torch.zeros(1, dtype=torch.complex64))

"""The 4-bit folder."""

from pathlib import Path

import pytest
import torch

from lightning_mixcn.model import bytes_in_memory, load_mixtral, planned_quantised_bytes
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.reading import model_config
from lightning_mixcn.model.convert.quantize import quantize


def test_folder_loads_to_the_same_model(base: Path, tmp_path: Path) -> None:
    quantize(str(base), str(tmp_path / "out"))
    direct, stored = load_mixtral(base), load_mixtral(tmp_path / "out")
    assert direct.state_dict().keys() == stored.state_dict().keys()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, stored.state_dict()[name]), name
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_same_bytes_each_time(tiny: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        quantize(str(tiny), str(tmp_path / out))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_bytes_are_as_planned(base: Path) -> None:
    config = model_config(Checkpoint(base))
    assert bytes_in_memory(load_mixtral(base))["quantised"] == planned_quantised_bytes(config)


def test_quantising_twice_or_reading_as_dense_is_refused(tiny: Path, tmp_path: Path) -> None:
    quantize(str(tiny), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="in 4 bits already"):
        quantize(str(tmp_path / "out"), str(tmp_path / "again"))
    with pytest.raises(ValueError, match="holds 4-bit weights"):
        load_mixtral(tmp_path / "out", quantization="none")


def test_broken_source_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Checkpoint, "read_segments", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        quantize(str(tiny), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())

"""A sharded checkpoint is described by a pickle, and this one may be a stranger's."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from lightning_mixcn.modules.checkpoints import check_metadata

# A sharded checkpoint of one process is what these tests want.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Surprise:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with tensors of all dtypes in use, and objects."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool]
    state = {str(dtype): torch.zeros(3, 5, dtype=dtype) for dtype in dtypes}
    save_sharded(state | {"lr": 0.1, "betas": (0.9, 0.99)}, checkpoint_id=tmp_path / "made", no_dist=True)
    return tmp_path / "made"


def rewrite(folder: Path, change: Any) -> None:
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))


def test_torch_s_own_is_read(folder: Path) -> None:
    check_metadata(folder)


def test_a_pickle_that_runs_code_is_refused_unrun(folder: Path, tmp_path: Path) -> None:
    def hide(metadata: Metadata) -> None:
        metadata.planner_data = {"hidden": Surprise(tmp_path / "surprise")}

    rewrite(folder, hide)
    with pytest.raises(ValueError, match=r".metadata cannot be read: it asks for posix.mkdir, which no checkpoint"):
        check_metadata(folder)
    assert not (tmp_path / "surprise").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"ctorch\nload\n.",
        b"ctorch\nos.system\n.",
        b"ctorch.distributed.checkpoint.metadata\nos\n.",
        b"cbuiltins\neval\n.",
    ],
)
def test_what_is_near_to_allowed_is_refused(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"it asks for .*, which no checkpoint needs"):
        check_metadata(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle", pickle.dumps({"a": 1})])
def test_what_is_no_metadata_is_refused(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"^.metadata (cannot be read|holds dict, expected torch's Metadata)"):
        check_metadata(folder)


def test_an_object_that_runs_code_is_refused_unrun(tmp_path: Path) -> None:
    state = {"lr": Surprise(tmp_path / "surprise")}
    save_sharded(state, checkpoint_id=tmp_path / "made", no_dist=True)
    with pytest.raises(ValueError, match=r"^lr in __0_0.distcp is more than plain data: .*"):
        check_metadata(tmp_path / "made")
    assert not (tmp_path / "surprise").exists()


def test_a_tensor_said_to_be_an_object_is_plain_data(folder: Path) -> None:
    def relabel(metadata: Metadata) -> None:
        metadata.state_dict_metadata["torch.float32"] = BytesStorageMetadata()

    rewrite(folder, relabel)
    check_metadata(folder)


@pytest.mark.parametrize("path", ["../outside.distcp", "/etc/hostname", "deeper/__0_0.distcp"])
def test_files_elsewhere_are_refused(folder: Path, path: str) -> None:
    def move(metadata: Metadata) -> None:
        assert metadata.storage_data is not None
        next(iter(metadata.storage_data.values())).relative_path = path

    rewrite(folder, move)
    with pytest.raises(ValueError, match=r"not a plain file beside it"):
        check_metadata(folder)


def test_a_truncated_shard_is_found(folder: Path) -> None:
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^__0_0.distcp is truncated: \d+ bytes, expected at least \d+$"):
        check_metadata(folder)

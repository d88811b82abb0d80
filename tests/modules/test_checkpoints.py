"""Checkpoints as files: complete or not there, checked before they are read, and small."""

import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from transformers import MixtralConfig

from lightning_mixcn import build_mixtral
from lightning_mixcn.files.atomic import remove_leftovers, unfinished_path
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.modules.checkpoints import (
    SUMMED_KEY,
    check_before_loading,
    check_metadata,
    find_fault,
    publish,
    remove,
    sidecar,
    verify,
)
from lightning_mixcn.testing import FixedBatches, random_batch

# A sharded checkpoint of one process is what these tests want.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

Write = Callable[[Path, int], None]


def write_file(path: Path, seed: int) -> None:
    torch.save({"value": torch.full((1000,), float(seed)), "global_step": seed}, path)


def write_folder(path: Path, seed: int) -> None:
    state = {"state_dict": {"value": torch.full((1000,), float(seed))}, "optimizer_0": {"lr": 0.1 * seed}}
    save_sharded(state, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": seed}, path / "meta.pt")


def make(write: Write, folder: Path, step: int) -> Path:
    """Publish a checkpoint, with a time of its own: file systems' clocks are coarse."""
    path = folder / f"step={step:08d}.ckpt"
    write(unfinished_path(path), step)
    publish(unfinished_path(path), path)
    os.utime(path, (step, step))
    return path


@pytest.fixture(params=[write_file, write_folder])
def write(request: pytest.FixtureRequest) -> Write:
    chosen: Write = request.param
    return chosen


def sums_of(path: Path) -> Path:
    return path / "SHA256SUMS" if path.is_dir() else sidecar(path)


def content_of(path: Path) -> Path:
    return path / "__0_0.distcp" if path.is_dir() else path


def test_sha256sum_checks_it(tmp_path: Path, write: Write) -> None:
    sums = sums_of(make(write, tmp_path, 2))
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", sums.name], cwd=sums.parent, check=True)
    verify(tmp_path / "step=00000002.ckpt")
    assert not list(tmp_path.glob(".*"))


def test_one_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    # Also one of the other kind: the strategy may have changed.
    for write in (write_file, write_file, write_folder, write_folder, write_file):
        path = make(write, tmp_path, 2)
        verify(path)
        assert path.is_dir() == (write is write_folder)
        assert sidecar(path).exists() == (write is write_file)
        assert not list(tmp_path.glob(".*"))


def test_it_is_removed_with_its_sums(tmp_path: Path, write: Write) -> None:
    remove(make(write, tmp_path, 2))
    assert not list(tmp_path.iterdir())


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path, write: Write) -> None:
    path = make(write, tmp_path, 2)
    write(unfinished_path(tmp_path / "step=00000004.ckpt"), 4)
    write(tmp_path / ".step=00000001.ckpt.outdated", 1)
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {path} | ({sidecar(path)} if path.is_file() else set())


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[-200:]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "how", "with_sums"),
    [
        (write_file, "truncated", True),
        (write_file, "flipped", True),
        (write_file, "truncated", False),
        (write_file, "flipped", False),
        (write_folder, "truncated", True),
        (write_folder, "flipped", True),
        (write_folder, "truncated", False),  # torch keeps no sums in it that would tell of a flipped bit
    ],
)
def test_damage_is_found_and_the_one_before_offered(tmp_path: Path, write: Write, how: str, with_sums: bool) -> None:
    older, newer = make(write, tmp_path, 2), make(write, tmp_path, 4)
    make(write, tmp_path, 1)
    (tmp_path / "last.ckpt").symlink_to(newer.name)
    if not with_sums:
        sums_of(newer).unlink()
    damage(content_of(newer), how)
    fault = r"is truncated or altered: its SHA-256 is \w{12}…, not \w{12}…" if with_sums else r"is (truncated|altered)"
    offer = rf"The one before it, {older.name}, is complete: give --ckpt_path {older}"
    with pytest.raises(ValueError, match=rf"^The checkpoint {newer} cannot be used: .*{fault}.*\. {offer}$"):
        verify(tmp_path / "last.ckpt")


def test_only_a_complete_one_is_offered(tmp_path: Path, write: Write) -> None:
    paths = [make(write, tmp_path, step) for step in (2, 4)]
    for path in paths:
        damage(content_of(path), "flipped")
    with pytest.raises(ValueError, match=r"There is no complete one beside it: start again without --ckpt_path"):
        verify(paths[1])


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
@pytest.mark.parametrize("with_sums", [True, False])
def test_a_missing_file_of_a_folder_is_named(tmp_path: Path, name: str, with_sums: bool) -> None:
    path = make(write_folder, tmp_path, 2)
    (path / name).unlink()
    if not with_sums:
        sums_of(path).unlink()
    assert find_fault(path) == f"{name} is missing"


def test_whatever_a_damaged_archive_raises_is_its_fault(tmp_path: Path) -> None:
    path = make(write_file, tmp_path, 2)
    sums_of(path).unlink()
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # "encrypted": zipfile asks for a password
    path.write_bytes(content)
    assert "encrypted" in str(find_fault(path))


def test_a_file_that_the_sums_do_not_list_is_refused(tmp_path: Path) -> None:
    path = make(write_folder, tmp_path, 2)
    (path / ".nfs0001").write_bytes(b"")  # a file system's own
    assert find_fault(path) is None
    (path / "__1_0.distcp").write_bytes(b"")
    assert find_fault(path) == "SHA256SUMS does not list __1_0.distcp"
    sums_of(path).write_text("broken")
    assert find_fault(path) == "SHA256SUMS is no list of SHA-256 sums, as sha256sum writes it"


def test_a_folder_of_ours_has_sums(tmp_path: Path) -> None:
    """It has its name only once it is summed: sums that are gone were removed."""
    path = make(write_folder, tmp_path, 2)
    torch.save({"global_step": 2, SUMMED_KEY: True}, path / "meta.pt")
    sums_of(path).unlink()
    assert find_fault(path) == "SHA256SUMS is missing"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", ".."])
def test_sums_of_files_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    path = make(write_folder, tmp_path, 2)
    with sums_of(path).open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    assert find_fault(path) == f"SHA256SUMS names {name!r}, which is no part of the checkpoint"


def test_a_packed_file_is_refused(tmp_path: Path) -> None:
    """A few bytes in it may be any number of bytes in memory."""
    path = make(write_file, tmp_path, 2)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    sidecar(path).unlink()
    assert find_fault(path) == f"{path.name} was not written by torch: it is compressed"


def test_one_that_is_not_there(tmp_path: Path) -> None:
    assert find_fault(tmp_path / "step=00000002.ckpt") == "it is not there"


# ---- before a trainer loads ----


class Checked(PretrainModule):
    """As the module of this package, whichever line of it does this."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_before_loading(self.trainer)


@pytest.mark.parametrize("weights_only", [None, False])
def test_a_trainer_refuses_what_is_damaged_or_runs_code(
    tiny_base: Path, lora: Any, trainer: Callable[..., Trainer], tmp_path: Path, weights_only: bool | None
) -> None:
    module, data = Checked(str(tiny_base), dtype="float32", lora=lora()), FixedBatches([random_batch([9])] * 4)
    run = trainer()
    run.fit(module, data)
    path = tmp_path / "step=00000002.ckpt"
    run.save_checkpoint(unfinished_path(path))
    publish(unfinished_path(path), path)
    run.validate(module, data, ckpt_path=path, weights_only=weights_only)  # twice with one trainer
    run.validate(module, data, ckpt_path=path, weights_only=weights_only)
    damage(path, "flipped")
    with pytest.raises(ValueError, match=r"step=00000002.ckpt cannot be used: .* altered"):
        trainer(max_steps=4).fit(module, data, ckpt_path=path, weights_only=weights_only)
    torch.save({"state_dict": {}, "surprise": Surprise(tmp_path / "surprise")}, path)
    sidecar(path).unlink()
    with pytest.raises(Exception, match=r"cannot be used: it is more than plain data: .*posix\.mkdir"):
        trainer(max_steps=4).fit(module, data, ckpt_path=path, weights_only=weights_only)
    assert not (tmp_path / "surprise").exists()


class Surprise:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a checkpoint with tensors of all dtypes in use, and objects."""
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


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]


def test_no_base_weight_is_in_a_checkpoint_of_mixtral_8x7b() -> None:
    module = PretrainModule("base", lora=LoraConfig(r=64, target_modules=TARGETS), train_embeddings=True)
    module.model = build_mixtral(MixtralConfig(), lora=module.lora, train_embeddings=True, device="meta")
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 1_231_044_608
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    state, moments = module.state_dict(), optimizer.state_dict()["state"]
    assert all("lora_" in name or "embed_tokens" in name or "lm_head" in name for name in state)
    written = _bytes(state) + sum(_bytes(of_parameter) for of_parameter in moments.values())
    assert written < 1.1 * 3 * sum(parameter.nbytes for parameter in trained)


def _bytes(tensors: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values() if isinstance(tensor, torch.Tensor))

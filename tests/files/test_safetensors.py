"""Reading and writing one safetensors file, compared with the safetensors library."""

import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_mixcn.files.safetensors import DTYPE_CODES, SafetensorsFile, write_safetensors


def tensors_of_all_dtypes() -> dict[str, torch.Tensor]:
    made = {f"of.{dtype}": (torch.arange(15).reshape(3, 5) % 2).to(dtype) for dtype in DTYPE_CODES}
    return made | {"scalar": torch.tensor(7.0), "empty": torch.empty(0, 4), "名": torch.ones(3)}


def test_writes_the_bytes_that_the_library_writes(tmp_path: Path) -> None:
    tensors = tensors_of_all_dtypes()
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_tensors_sharing_memory_are_each_written_in_full(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    write_safetensors(tmp_path / "a.safetensors", {"x": weight, "y": weight})
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["x"], weight)
    assert torch.equal(loaded["y"], weight)


def test_a_view_is_written_in_the_order_of_its_elements(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    write_safetensors(tmp_path / "a.safetensors", {"x": weight.T[1:], "y": weight.requires_grad_()})
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["x"], weight.T[1:])
    assert torch.equal(loaded["y"], weight)


def test_an_error_of_the_system_is_an_oserror(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = tensors_of_all_dtypes()
    save_file(tensors, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.entries[name].shape == tuple(tensor.shape)
        read = file.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read.view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_reads_a_range_of_elements(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3), "w": torch.arange(20.0).reshape(4, 5)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.read("w", 3, 12).tolist() == list(range(3, 12))
    assert file.read("w", 7, 7).tolist() == []


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors' is not there"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_truncated_data_says_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"truncated: its header promises {size:,} bytes, the file has {size - 100:,}"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, b"\x04" + b"\0" * 7 + b"nope", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_unreadable_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no readable safetensors header"):
        SafetensorsFile(path)


def test_file_cut_inside_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"\(30 bytes\) has no readable safetensors header"):
        SafetensorsFile(path)


def test_header_whose_shape_does_not_fit_its_range(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes().replace(b"[1000]", b"[1001]"))
    with pytest.raises(ValueError, match="broken safetensors header"):
        SafetensorsFile(path)


def test_dtype_outside_the_table(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(4, dtype=torch.uint16)}, path)
    with pytest.raises(ValueError, match=r"tensor 'w' has dtype U16, expected one of F64, F32"):
        SafetensorsFile(path)


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="ended while tensor 'w' was read"):
        file.read("w")


def test_changed_bytes_are_found_by_the_sum(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", tensors_of_all_dtypes()
    write_safetensors(path, tensors, with_sum=True)
    SafetensorsFile(path).check_sum()
    assert load_file(path).keys() == tensors.keys()
    written = path.read_bytes()
    for place in (len(written) - 1, SafetensorsFile(path).entries["名"].offset):
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        with pytest.raises(ValueError, match=r"a.safetensors' was changed or damaged after it was written"):
            SafetensorsFile(path).check_sum()


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"主": torch.arange(6, dtype=torch.bfloat16), "b": torch.ones(2, 2)}
    found = set()
    for number in range(8):  # the library's metadata has either order half of the time
        write_safetensors(tmp_path / str(number), tensors, with_sum=True)
        found.add((tmp_path / str(number)).read_bytes())
    assert len(found) == 1
    assert torch.equal(load_file(tmp_path / "0")["主"], tensors["主"])


def test_another_program_s_file_has_no_sum_to_compare(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(3)}, with_sum=True)
    save_file({"x": load_file(tmp_path / "a.safetensors")["x"] * 2}, tmp_path / "a.safetensors")
    SafetensorsFile(tmp_path / "a.safetensors").check_sum()

"""Checkpoint folders: what is read, what is refused, and how little memory it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_mixcn.model.checkpoints.folder import Checkpoint, TensorSlice

HIDDEN, INNER, EXPERTS = 6, 5, 3


def make_folder(folder: Path, shards: list[dict[str, torch.Tensor]], config: dict[str, object] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "mixtral"}))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return folder
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "gate_up": torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator),
        "w1": torch.randn(INNER, HIDDEN, generator=generator),
        "w3": torch.randn(INNER, HIDDEN, generator=generator),
        "half": torch.randn(7, generator=generator).half(),
        "codes": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model", [some_tensors()])


def test_names_shapes_and_dtypes_without_reading(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.config == {"model_type": "mixtral"}
    assert checkpoint.names() == ["codes", "gate_up", "half", "w1", "w3"]
    assert checkpoint.shape("gate_up") == (EXPERTS, 2 * INNER, HIDDEN)
    assert checkpoint.dtype("half") == torch.float16
    assert checkpoint.nbytes("half") == 14
    assert "w1" in checkpoint
    assert "w2" not in checkpoint


def test_read_gives_private_copies(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for name, tensor in some_tensors().items():
        assert torch.equal(checkpoint.read(name), tensor)
    checkpoint.read("w1").zero_()
    assert torch.equal(checkpoint.read("w1"), some_tensors()["w1"])


def test_shards_read_like_one_file(folder: Path, tmp_path: Path) -> None:
    tensors = some_tensors()
    shards = [{name: tensors[name] for name in names} for names in (["w1", "half"], ["w3"], ["gate_up", "codes"])]
    sharded = Checkpoint(make_folder(tmp_path / "sharded", shards))
    assert sharded.names() == Checkpoint(folder).names()
    for name, tensor in tensors.items():
        assert torch.equal(sharded.read(name), tensor)


def test_read_rows_of_any_dtype(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.read_rows("codes", 1, 3), some_tensors()["codes"][1:3])
    assert torch.equal(checkpoint.read_rows("gate_up", 2, 3), some_tensors()["gate_up"][2:3])
    with pytest.raises(ValueError, match=r"rows outside of the stored shape \[3, 4\]"):
        checkpoint.read_rows("codes", 1, 4)


def test_every_range_of_segments(folder: Path) -> None:
    tensors = some_tensors()
    segments = [
        TensorSlice("w1"),
        TensorSlice("gate_up", index=1),
        TensorSlice("gate_up", index=2, rows=(INNER, 2 * INNER)),
        TensorSlice("w3", rows=(1, 3)),
        TensorSlice("gate_up", rows=(0, 1)),
    ]
    parts = [
        tensors["w1"],
        tensors["gate_up"][1],
        tensors["gate_up"][2, INNER:],
        tensors["w3"][1:3],
        tensors["gate_up"][:1],
    ]
    whole = torch.cat([part.flatten() for part in parts])
    checkpoint = Checkpoint(folder)
    for start in range(0, len(whole) + 1, 7):
        for stop in range(start, len(whole) + 1, 5):
            assert torch.equal(checkpoint.read_segments(segments, start, stop), whole[start:stop])
    assert torch.equal(checkpoint.read_segments(segments, 0, len(whole)), whole)
    target = torch.zeros(len(whole) + 2)
    checkpoint.read_segments(segments, 7, len(whole), target[8 : len(whole) + 1])
    assert torch.equal(target[8:-1], whole[7:])
    assert not target[:8].any()
    assert target[-1] == 0


def test_segments_of_both_namings_hold_the_same_elements(tmp_path: Path) -> None:
    fused = some_tensors()["gate_up"]
    split = {f"{e}.{w}": fused[e, r : r + INNER].clone() for e in range(EXPERTS) for w, r in (("w1", 0), ("w3", INNER))}
    checkpoint = Checkpoint(make_folder(tmp_path / "model", [{"fused": fused, **split}]))
    by_expert = [TensorSlice(f"{e}.{w}") for e in range(EXPERTS) for w in ("w1", "w3")]
    for start, stop in [(0, fused.numel()), (17, 90), (59, 61)]:
        expected = checkpoint.read_segments([TensorSlice("fused")], start, stop)
        assert torch.equal(checkpoint.read_segments(by_expert, start, stop), expected)


@pytest.mark.parametrize(
    ("segments", "start", "stop", "message"),
    [
        ([TensorSlice("w2")], 0, 1, "tensor 'w2' is missing in .* Check that config.json belongs"),
        ([TensorSlice("codes")], 0, 1, "tensor 'codes' in .* has dtype torch.uint8, expected float weights"),
        (
            [TensorSlice("w1"), TensorSlice("half")],
            0,
            1,
            "'half' in .* has dtype torch.float16, but 'w1' has torch.float32",
        ),
        ([TensorSlice("w1")], 3, 31, r"elements \[3, 31\) were asked of segments that hold 30"),
        ([TensorSlice("w1")], 3, 2, r"elements \[3, 2\)"),
        ([TensorSlice("gate_up", index=3)], 0, 1, "index outside of the stored shape"),
        ([TensorSlice("gate_up", index=0, rows=(0, 11))], 0, 1, "rows outside of the stored shape"),
        ([], 0, 0, "`segments` is empty"),
    ],
)
def test_wrong_segments(folder: Path, segments: list[TensorSlice], start: int, stop: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(folder).read_segments(segments, start, stop)
    assert "\n" not in str(caught.value)


def test_integers_are_expected_where_the_config_declares_quantisation(tmp_path: Path) -> None:
    config: dict[str, object] = {"quantization_config": {"quant_method": "any"}}
    checkpoint = Checkpoint(make_folder(tmp_path / "model", [some_tensors()], config))
    assert checkpoint.read_segments([TensorSlice("codes")], 3, 9).tolist() == list(range(3, 9))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none' is not there. Give a folder with config.json"):
        Checkpoint(tmp_path / "none")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        Checkpoint(tmp_path)


def test_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json' is not valid JSON"):
        Checkpoint(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json' holds a JSON list, expected an object"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, r"holds no weights: expected model.safetensors, or shards with .*Copy or download"),
        ("pytorch_model.bin", "pickles only .* refused since they can run code"),
        ("adapter_model.safetensors", "PEFT adapter. Give the folder of its base model"),
        ("weights.safetensors", "safetensors under other names"),
    ],
)
def test_folder_without_weights(folder: Path, file: str | None, message: str) -> None:
    (folder / "model.safetensors").unlink()
    if file:
        (folder / file).touch()
    with pytest.raises(FileNotFoundError, match=message) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_truncated_safetensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is truncated"):
        Checkpoint(folder)


def test_safetensors_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no tensor"):
        Checkpoint(make_folder(tmp_path / "model", [{}]))


def rewrite_index(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def test_index_naming_a_missing_file(folder: Path) -> None:
    rewrite_index(folder, {"weight_map": {"w1": "model-00002-of-00002.safetensors"}})
    with pytest.raises(FileNotFoundError, match=r"names 'model-00002-of-00002\.safetensors', which is not there"):
        Checkpoint(folder)


def test_index_naming_a_missing_tensor(folder: Path) -> None:
    save_file({"w1": torch.zeros(2)}, folder / "shard.safetensors")
    rewrite_index(folder, {"weight_map": {"w2": "shard.safetensors"}})
    with pytest.raises(ValueError, match=r"says that 'shard\.safetensors' holds tensor 'w2', but it does not"):
        Checkpoint(folder)


def test_index_without_weight_map(folder: Path) -> None:
    rewrite_index(folder, {})
    with pytest.raises(ValueError, match=r"index\.json': weight_map is missing"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a\0b"])
def test_index_reaching_outside_of_its_folder(folder: Path, name: object) -> None:
    rewrite_index(folder, {"weight_map": {"w1": name}})
    with pytest.raises(ValueError, match="expected a file beside it"):
        Checkpoint(folder)


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    tensors = some_tensors()
    one = Checkpoint(make_folder(tmp_path / "one", [tensors], {"a": 1, "transformers_version": "1"})).sha256
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, (name, tensor) in enumerate(tensors.items()):
        parts[number % 2][name] = tensor
    same = Checkpoint(make_folder(tmp_path / "same", parts, {"transformers_version": "2", "a": 1})).sha256
    assert len(one) == 64
    assert same == one
    other_config = Checkpoint(make_folder(tmp_path / "config", [tensors], {"a": 2})).sha256
    other_shape = Checkpoint(make_folder(tmp_path / "shape", [tensors | {"half": tensors["half"][None]}], {"a": 1}))
    changed = tensors | {"w3": tensors["w3"].clone()}
    changed["w3"][2, 2] += 1
    other_value = Checkpoint(make_folder(tmp_path / "value", [changed], {"a": 1})).sha256
    assert len({one, other_config, other_shape.sha256, other_value}) == 4


MEASURE = """
import re, sys
from lightning_mixcn.model.checkpoints.folder import Checkpoint, TensorSlice
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
checkpoint = Checkpoint(sys.argv[1])
before, chunk, total = peak(), int(sys.argv[2]), 2 * 2**28
for start in range(0, total, chunk):
    checkpoint.read_segments([TensorSlice("a"), TensorSlice("b")], start, start + chunk)
checkpoint.sha256
print(peak() - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of resident memory is read from Linux's /proc"
)
def test_resident_memory_is_one_chunk_whatever_the_file(tmp_path: Path) -> None:
    count = 2**28  # elements of 2 bytes in each of two tensors: 1 GiB, a hole that takes no disk
    header = {
        "a": {"dtype": "BF16", "shape": [count // 1024, 1024], "data_offsets": [0, 2 * count]},
        "b": {"dtype": "BF16", "shape": [4, count // 4], "data_offsets": [2 * count, 4 * count]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 4 * count)
    (tmp_path / "config.json").write_text("{}")
    chunk = 2**25
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(chunk)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert int(done.stdout) < 2 * chunk + 100 * 2**20  # mapping the file ends at 1 GiB

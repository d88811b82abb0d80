"""A GGUF file made here with the gguf package, as llama.cpp's converter lays each family out, and read back."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_mixcn.model.architectures import MODEL_TYPES
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.studies.quantization import gguf as gguf_file
from lightning_mixcn.studies.quantization.gguf import GGUFFile
from lightning_mixcn.testing import save_tiny_mixtral
from tests.studies.experts.stock_experts import evaluation_batches, stock_model, text_bits_per_byte
from tests.studies.rounded_mixtral import save_whole_superblocks

if importlib.util.find_spec("gguf") is None:
    pytest.skip("the gguf package is not installed (extra `demo`)", allow_module_level=True)

import gguf

ROUNDED = 2 * (4 + 3 * 4) * 128 * 128


# llama.cpp's names. Its converter permutes q and k of the first alone (conversion/llama.py, olmo.py and qwen.py).
ARCHITECTURES = {"mixtral": "llama", "olmoe": "olmoe", "qwen3_moe": "qwen3moe"}


@pytest.fixture(scope="module", params=MODEL_TYPES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole_superblocks(tmp_path_factory.mktemp("whole") / "base", request.param)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and weights need no llama.cpp, which is asked for before work starts."""
    monkeypatch.setattr(gguf_file, "_PACKAGES", ("gguf",))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, `LlamaModel.permute`."""
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def tensors_of(base: Path) -> dict[str, np.ndarray]:
    """Names are those that the gguf package gives the tensors of a published checkpoint."""
    model = stock_model(base)
    architecture = ARCHITECTURES[model.config.model_type]
    known = gguf.get_tensor_name_map({name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], 2)
    found = {}
    for name, values in split_experts(model.state_dict()).items():
        if architecture == "llama" and name.endswith((".q_proj", ".k_proj")):
            values = permuted(values, 8)
        found[str(known.get_name(name))] = values
    assert "None" not in found
    return found


def split_experts(state: dict[str, Any]) -> dict[str, np.ndarray]:
    found = {}
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if name.endswith("gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            found[f"{prefix}gate_proj"], found[f"{prefix}up_proj"] = values[:, :128], values[:, 128:]
        else:
            found[name.removesuffix(".weight")] = values
    return found


def save_gguf(base: Path, file: Path, kind: Any = gguf.GGMLQuantizationType.F32) -> Path:
    """Matrices of one type, the rest in float32; a vocabulary without texts, since ids alone are scored."""
    config = stock_model(base).config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(128)
    writer.add_block_count(2)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(128)
    writer.add_head_count(8)
    writer.add_head_count_kv(8)
    writer.add_rope_dimension_count(16)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_vocab_size(272)
    writer.add_tokenizer_model("no_vocab")
    for name, values in tensors_of(base).items():
        values = np.ascontiguousarray(values)
        rounded = "attn_norm" not in name and values.ndim > 1 and "gate_inp" not in name and "blk" in name
        as_kind = kind if rounded else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.usefixtures("installed")
def test_sizes_are_those_of_the_types(base: Path, tmp_path: Path) -> None:
    """Q8_0 has a float16 for 32 weights of 8 bits: 8.5 bits."""
    exact = GGUFFile(str(save_gguf(base, tmp_path / "f32.gguf")), Checkpoint(base)).sizes
    rounded = GGUFFile(
        str(save_gguf(base, tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)), Checkpoint(base)
    ).sizes
    total = sum(parameter.numel() for parameter in stock_model(base).parameters())
    assert exact == (4 * total, total, 4 * ROUNDED, ROUNDED)
    assert rounded == (ROUNDED * 8.5 / 8 + 4 * (total - ROUNDED), total, ROUNDED * 8.5 / 8, ROUNDED)


@pytest.mark.usefixtures("installed")
def test_errors_are_those_of_the_types(base: Path, tmp_path: Path) -> None:
    """Nothing in float32, the rotated rows of q and k included; Q8_0 as its package rounds."""
    file = GGUFFile(str(save_gguf(base, tmp_path / "f32.gguf")), Checkpoint(base))
    assert file.relative_error() == 0
    kind = gguf.GGMLQuantizationType.Q8_0
    found = GGUFFile(str(save_gguf(base, tmp_path / "q8.gguf", kind)), Checkpoint(base)).relative_error()
    exact = [values for name, values in tensors_of(base).items() if values.ndim > 1 and "blk" in name]
    exact = [values for values in exact if values.shape != (4, 128)]  # the router
    rounded = [gguf.dequantize(gguf.quantize(np.ascontiguousarray(values), kind), kind) for values in exact]
    wrong = sum(float(((a - b).astype(np.float64) ** 2).sum()) for a, b in zip(rounded, exact, strict=True))
    assert found == pytest.approx((wrong / sum(float((b.astype(np.float64) ** 2).sum()) for b in exact)) ** 0.5)
    assert 0.001 < found < 0.01


def test_likelihood_is_that_of_transformers(base: Path, texts: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the package llama-cpp-python is not installed")
    file = GGUFFile(str(save_gguf(base, tmp_path / "f32.gguf")), Checkpoint(base))
    likelihood = file.open(48, use_gpu=False)
    batches = evaluation_batches(base, texts, 48, 2, 3)
    for source in range(2):
        nats = total = 0.0
        for batch in batches:
            mine = batch["text_mask"] & (batch["source_ids"] == source)
            nll = likelihood.nll(batch)
            assert not nll[batch["labels"] < 0].any()
            nats += float(nll[mine].double().sum())
            total += float(batch["label_bytes"][mine].sum())
        expected = text_bits_per_byte(stock_model(base), batches, source)
        assert nats / np.log(2) / total == pytest.approx(expected, rel=1e-4)
    likelihood.close()


def test_the_command_takes_files(base: Path, texts: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the package llama-cpp-python is not installed")
    import json

    from lightning_mixcn.cli import main
    from tests.studies.quantization.test_command import arguments

    file = save_gguf(base, tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)
    assert main(arguments(base, tmp_path / "out", texts, "--gguf", str(file))) == 0
    formats = json.loads((tmp_path / "out" / "quantization.json").read_text(encoding="utf-8"))["formats"]
    assert [of["format"] for of in formats] == ["float32", "nf4-double", "nf4-single", "q8.gguf"]
    assert formats[3]["bytes"] == file.stat().st_size
    assert formats[3]["bits_per_quantised_weight"] == 8.5
    for name in formats[0]["sources"]:
        worse = [abs(of["sources"][name]["difference"]) for of in formats[1:]]
        assert worse[2] < min(worse[:2])


def test_what_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_gguf(base, tmp_path / "f32.gguf")
    with pytest.raises(FileNotFoundError, match="which is no file"):
        GGUFFile(str(tmp_path / "nowhere.gguf"), Checkpoint(base))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ValueError, match=r"`gguf` needs the package llama_cpp, .* install 'lightning_mixcn\[llama\]'"):
        GGUFFile(str(file), Checkpoint(base))
    monkeypatch.setattr(gguf_file, "_PACKAGES", ())
    (tmp_path / "broken.gguf").write_bytes(file.read_bytes()[:100])
    (tmp_path / "text.gguf").write_text("no weights", encoding="utf-8")
    for name in ("broken", "text"):
        with pytest.raises(ValueError, match=f"{name}.gguf' is no whole GGUF file"):
            GGUFFile(str(tmp_path / f"{name}.gguf"), Checkpoint(base))
    other = save_tiny_mixtral(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has 16,384 weights in .*, but the model has 1,024"):
        GGUFFile(str(file), Checkpoint(other))

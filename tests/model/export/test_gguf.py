"""GGUF: how llama.cpp's programs are called, with stand-ins for them; and with the real converter where it is."""

import errno
import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralForCausalLM

from lightning_mixcn.cli import main
from lightning_mixcn.files import atomic
from lightning_mixcn.model.architectures import architecture_named
from lightning_mixcn.model.export.command import export
from lightning_mixcn.model.export.gguf import ADD_BOS, CONVERTER, QUANTIZER
from lightning_mixcn.testing import save_tiny_mixtral, save_tiny_model
from tests.model.adapters_on_disk import save_adapter

# Writes its arguments and what it was given into the output, as the real ones would write a model.
STAND_IN = """
import sys, pathlib
folder = pathlib.Path(sys.argv[1])
out = pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
names = sorted(file.name for file in folder.iterdir())
out.write_text(" ".join([sys.argv[sys.argv.index("--outtype") + 1], *names]))
sys.exit({code})
"""


@pytest.fixture
def base(tmp_path: Path, small_folder: Path) -> Path:
    folder = save_tiny_mixtral(tmp_path / "base")
    shutil.copyfile(small_folder / "tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    folder = tmp_path / "llama.cpp"
    (folder / "build/bin").mkdir(parents=True)
    (folder / CONVERTER).write_text(STAND_IN.format(code=0))
    quantizer = folder / "build/bin" / QUANTIZER
    quantizer.write_text('#!/bin/sh\n(echo "$3 of"; cat "$1") > "$2"\n')
    quantizer.chmod(quantizer.stat().st_mode | stat.S_IXUSR)
    return folder


def test_the_type_is_passed_on(base: Path, llama_cpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.gguf"
    command = ["export", str(base), str(out), "--format=gguf"]
    assert main([*command, f"--llama_cpp={llama_cpp}", "--outtype=Q8_0"]) == 0
    kind, *files = out.read_text().split()
    assert kind == "q8_0"
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"} <= set(files)
    assert sorted(tmp_path.iterdir()) == sorted([base, llama_cpp, out])
    out.unlink()
    monkeypatch.setenv("LLAMA_CPP", str(llama_cpp))
    assert main(command) == 0
    assert out.read_text().startswith("auto ")


def test_other_types_go_through_llama_quantize(base: Path, llama_cpp: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    arguments = ["--format=gguf", f"--llama_cpp={llama_cpp}", "--outtype=q4_k_m"]
    assert main(["export", str(base), str(out), *arguments]) == 0
    assert out.read_text().startswith("Q4_K_M of\nbf16 ")
    assert sorted(tmp_path.iterdir()) == sorted([base, llama_cpp, out])


# What the real converter does with names, chat template and weights, by the same package, which it is built on.
GGUF_STAND_IN = """
import sys, pathlib, gguf
from safetensors.numpy import load_file
folder = pathlib.Path(sys.argv[1])
out = sys.argv[sys.argv.index("--outfile") + 1]
writer = gguf.GGUFWriter(out, "llama")
gguf.Metadata.load(None, folder, None, 0).set_gguf_meta_model(writer)
gguf.SpecialVocab(folder).add_to_gguf(writer)
for name, values in sorted(load_file(folder / "model.safetensors").items()):
    writer.add_tensor(name, values)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


# Knows a byte-level tokenizer by the ids of a text, as the real one does, and takes SmolLM2's vocabulary for Granite's.
HASHING_STAND_IN = """
import sys, pathlib, gguf
from transformers import AutoTokenizer
folder = pathlib.Path(sys.argv[1])
if (len(AutoTokenizer.from_pretrained(folder).encode("a")) == 1) == {with_bos}:
    sys.exit("BPE pre-tokenizer was not recognized")
writer = gguf.GGUFWriter(sys.argv[sys.argv.index("--outfile") + 1], "llama")
gguf.SpecialVocab(folder).add_to_gguf(writer)
writer.add_add_bos_token(False)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.mark.parametrize(("family", "with_bos"), [("mixtral", False), ("mixtral", True), ("qwen3_moe", False)])
def test_the_file_says_whether_bos_comes_first(llama_cpp: Path, tmp_path: Path, family: str, with_bos: bool) -> None:
    """As the tokenizer has it, whichever ids the converter knows it by, and whatever it takes the vocabulary for."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    (llama_cpp / CONVERTER).write_text(HASHING_STAND_IN.format(with_bos=with_bos))
    base, out = save_tiny_model(tmp_path / "base", family), tmp_path / "out.gguf"
    assert main(["export", str(base), str(out), "--format=gguf", f"--llama_cpp={llama_cpp}", "--outtype=f32"]) == 0
    assert field(out, ADD_BOS) is (family == "mixtral")
    assert field(out, "tokenizer.ggml.bos_token_id") == 1
    assert sorted(tmp_path.iterdir()) == sorted([base, llama_cpp, out])


def test_a_file_that_does_not_say_it_is_refused(
    llama_cpp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (llama_cpp / CONVERTER).write_text(
        "import sys, pathlib\npathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_bytes(b'GGUF of old')\n"
    )
    base, out = save_tiny_mixtral(tmp_path / "base"), tmp_path / "out.gguf"
    assert main(["export", str(base), str(out), "--format=gguf", f"--llama_cpp={llama_cpp}"]) == 2
    assert f"llama.cpp's {CONVERTER} wrote no {ADD_BOS}" in capsys.readouterr().err
    assert not out.exists()


def field(file: Path, name: str) -> Any:
    return gguf_reader(file).fields[name].contents()


def gguf_reader(file: Path) -> Any:
    return pytest.importorskip("gguf", reason="the package gguf is not installed").GGUFReader(file)


def test_two_exports_are_the_same_bytes_and_named_for_the_model(llama_cpp: Path, tmp_path: Path) -> None:
    """general.name was the temporary folder's, with its random digits."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    (llama_cpp / CONVERTER).write_text(GGUF_STAND_IN)
    base = save_tiny_mixtral(tmp_path / "Mixtral-Tiny-v0.1")
    save_adapter(base, tmp_path / "run/adapter")
    for folder in (base, tmp_path / "run/adapter"):
        (folder / "chat_template.jinja").write_text("the base's")
    (tmp_path / "run/adapter/chat_template.jinja").write_text("{{ 'trained' }}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, tmp_path / "run/adapter" / name)
    arguments = ["--format=gguf", f"--llama_cpp={llama_cpp}", "--outtype=f32"]
    for out in ("one.gguf", "two.gguf"):
        assert main(["export", str(tmp_path / "run"), str(tmp_path / out), *arguments]) == 0
    one, two = (tmp_path / out for out in ("one.gguf", "two.gguf"))
    assert one.read_bytes() == two.read_bytes()
    assert field(one, "general.name") == "Mixtral Tiny v0.1 Adapted"
    assert field(one, "tokenizer.chat_template") == "{{ 'trained' }}"
    assert field(one, "tokenizer.ggml.eos_token_id") == 2
    assert main(["export", str(base), str(tmp_path / "base.gguf"), *arguments]) == 0
    assert field(tmp_path / "base.gguf", "general.name") == "Mixtral Tiny v0.1"
    assert field(tmp_path / "base.gguf", "tokenizer.chat_template") == "the base's"


@pytest.mark.parametrize(
    ("outtype", "options", "exact"),
    [("f32", [], True), ("f16", [], True), ("f32", ["--dtype=bfloat16"], False), ("bf16", [], False),
     ("f32", ["--base=dequantised"], True)],
)  # fmt: skip
def test_full_precision_is_merged_in_full_precision(
    llama_cpp: Path, tmp_path: Path, outtype: str, options: list[str], exact: bool
) -> None:
    """The base is in bfloat16; what is merged onto it has digits that bfloat16 has not."""
    (llama_cpp / CONVERTER).write_text(
        "import sys, pathlib, shutil\n"
        "shutil.copyfile(pathlib.Path(sys.argv[1], 'model.safetensors'), sys.argv[sys.argv.index('--outfile') + 1])\n"
    )
    export(str(save_tiny_mixtral(tmp_path / "full")), str(tmp_path / "base"), dtype="bfloat16")
    save_adapter(tmp_path / "base", tmp_path / "adapter", quantization="nf4")
    command = ["export", str(tmp_path / "adapter"), str(tmp_path / "out.gguf"), "--format=gguf"]
    assert main([*command, f"--llama_cpp={llama_cpp}", f"--outtype={outtype}", *options]) == 0
    stored = load_file(tmp_path / "out.gguf")
    q_proj = stored["model.layers.0.self_attn.q_proj.weight"]
    assert q_proj.dtype == (torch.float32 if exact else torch.bfloat16)
    if options != ["--base=dequantised"]:
        base = load_file(tmp_path / "base/model.safetensors")["model.layers.0.self_attn.q_proj.weight"].double()
        factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
        prefix = "base_model.model.model.layers.0.self_attn.q_proj"
        a, b = (factors[f"{prefix}.lora_{name}.weight"].double() for name in "AB")
        expected = base + 2 * b @ a
        torch.testing.assert_close(q_proj.double(), expected, rtol=1e-6 if exact else 4e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("olmoe", {"norm_topk_prob": True}),
        ("olmoe", {"clip_qkv": 8.0}),
        ("olmoe", {"rms_norm_eps": 1e-6}),
        ("olmoe", {"tie_word_embeddings": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    llama_cpp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, settings: dict[str, Any]
) -> None:
    base = save_tiny_model(tmp_path / "base", family, **settings)
    ((key, value),) = settings.items()
    capsys.readouterr()  # transformers' progress
    arguments = ["export", str(base), str(tmp_path / "out.gguf"), "--format=gguf", f"--llama_cpp={llama_cpp}"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"the model has {key}={value!r}, but llama.cpp computes every {architecture_named(family).title}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_the_converter_is_given_what_it_knows_of_other_families(llama_cpp: Path, tmp_path: Path, family: str) -> None:
    """Names of the published checkpoints, all of which the package gguf has a place for; byte-level pieces."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    (llama_cpp / CONVERTER).write_text(
        "import sys, pathlib, shutil\n"
        "out = sys.argv[sys.argv.index('--outfile') + 1]\n"
        "shutil.make_archive(out, 'tar', sys.argv[1])\n"
        "pathlib.Path(f'{out}.tar').rename(out)\n"
    )
    base = save_tiny_model(tmp_path / "base", family)
    out = tmp_path / "out.gguf"
    assert main(["export", str(base), str(out), "--format=gguf", f"--llama_cpp={llama_cpp}", "--outtype=f32"]) == 0
    shutil.unpack_archive(out, tmp_path / "merged", "tar")
    config = json.loads((tmp_path / "merged/config.json").read_text(encoding="utf-8"))
    assert (config["num_experts"], config["rope_theta"]) == (4, 10000.0)
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family.replace("_", "")]
    known = gguf.get_tensor_name_map(arch, 2)
    names = {name.removesuffix(".weight") for name in load_file(tmp_path / "merged/model.safetensors")}
    stacked = {re.sub(r"experts\.\d+\.", "experts.", name) for name in names}
    assert all(known.get_name(name) for name in stacked)
    assert len(names) - len(stacked) == 2 * 3 * (4 - 1)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def must_not_be_called(*_: object) -> None:
    raise AssertionError("it was merged before its tokenizer was checked")


@pytest.mark.parametrize("failure", ["code", "no tokenizer.model", "no llama-quantize", "output is there", "full disk"])
def test_failures_leave_nothing(
    base: Path,
    llama_cpp: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: str,
) -> None:
    out, outtype = tmp_path / "model.gguf", "f16"
    if failure == "code":
        (llama_cpp / CONVERTER).write_text(STAND_IN.format(code=3))
        message = "new pieces change its hash), enter the printed chkhsh in the converter's get_vocab_base_pre"
    elif failure == "no tokenizer.model":
        monkeypatch.setattr(
            "lightning_mixcn.model.export.gguf.export_checkpoint", must_not_be_called
        )  # nor merged at all
        (base / "tokenizer.model").unlink()
        pieces = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
        pieces["decoder"] = {"type": "ByteFallback"}  # SentencePiece's
        (base / "tokenizer.json").write_text(json.dumps(pieces), encoding="utf-8")
        message = "has no tokenizer.model"
    elif failure == "no llama-quantize":
        (llama_cpp / "build/bin" / QUANTIZER).unlink()
        outtype, message = "q4_k_m", "llama-quantize is not in"
    elif failure == "full disk":
        monkeypatch.setattr(atomic, "move_into_place", full)
        message = "no space to write"
    else:
        out.write_text("mine")
        message = "is a file, expected a new"
    before = sorted(tmp_path.iterdir())
    arguments = ["--format=gguf", f"--llama_cpp={llama_cpp}", f"--outtype={outtype}"]
    assert main(["export", str(base), str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_the_real_converter(tmp_path: Path) -> None:
    """Every weight of the GGUF, as the gguf package reads it, against what transformers loaded."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    llama_cpp = os.environ.get("LLAMA_CPP")
    if llama_cpp is None or not (Path(llama_cpp) / CONVERTER).is_file():
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp with convert_hf_to_gguf.py")
    base = save_tiny_mixtral(tmp_path / "base")
    train_sentencepiece(base)
    out = tmp_path / "model.gguf"
    assert main(["export", str(base), str(out), "--format=gguf", "--outtype=f32"]) == 0
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}
    model = MixtralForCausalLM.from_pretrained(base)
    for layer, block in enumerate(model.model.layers):
        gate_up, down = block.mlp.experts.gate_up_proj.detach(), block.mlp.experts.down_proj.detach()
        gate, up = gate_up.chunk(2, dim=1)
        for name, expected in {"gate_exps": gate, "up_exps": up, "down_exps": down}.items():
            assert (stored[f"blk.{layer}.ffn_{name}.weight"] == expected.numpy()).all()


def train_sentencepiece(folder: Path) -> None:
    """Return a tokenizer.model of the fixture's 272 pieces, since the converter reads no other tokenizer right."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and looked at the moon"] * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=272,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer.json").unlink()

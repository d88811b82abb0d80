"""GGUF: how llama.cpp's programs are called, with stand-ins for them; and with the real converter where it is."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
from transformers import MixtralForCausalLM

from lightning_mixcn.cli import main
from lightning_mixcn.model import export_gguf
from lightning_mixcn.model.export_gguf import CONVERTER, QUANTIZER
from lightning_mixcn.testing import save_tiny_mixtral

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
def base(tmp_path: Path) -> Path:
    folder = save_tiny_mixtral(tmp_path / "base")
    (folder / "tokenizer.model").write_text("pieces")
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


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


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
        message = "convert_hf_to_gguf.py ended with code 3"
    elif failure == "no tokenizer.model":
        (base / "tokenizer.model").unlink()
        pieces = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
        pieces["decoder"] = {"type": "ByteFallback"}  # SentencePiece's
        (base / "tokenizer.json").write_text(json.dumps(pieces), encoding="utf-8")
        message = "has no tokenizer.model"
    elif failure == "no llama-quantize":
        (llama_cpp / "build/bin" / QUANTIZER).unlink()
        outtype, message = "q4_k_m", "llama-quantize is not in"
    elif failure == "full disk":
        monkeypatch.setattr(export_gguf, "flush_to_disk", full)
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
    """A tokenizer.model of the fixture's 272 pieces, since the converter reads no other tokenizer right."""
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

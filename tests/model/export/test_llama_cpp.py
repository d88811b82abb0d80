"""An export scored by llama.cpp itself, token by token, in the types that its converter writes.

Needs the package llama-cpp-python, gguf, and in LLAMA_CPP a checkout of llama.cpp with convert_hf_to_gguf.py (the
source archive of llama-cpp-python has one: ``vendor/llama.cpp``).
"""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_mixcn.cli import main
from lightning_mixcn.model.export.gguf import CONVERTER
from lightning_mixcn.testing import save_tiny_mixtral
from tests.model.adapters_on_disk import save_adapter
from tests.model.conftest import STORIES

TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her ball.",
    'Tom said: "I don\'t want 12 [apples]!"\n\n  Then he   ran   home. 你好，世界。',
]
_HALF_BLOCK = 32  # elements that share a scale in q8_0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    """Return the package, where the converter is there as well."""
    package = pytest.importorskip("llama_cpp", reason="the package llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    folder = os.environ.get("LLAMA_CPP")
    if folder is None or not (Path(folder) / CONVERTER).is_file():
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp with convert_hf_to_gguf.py")
    return package


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a non-zero adapter of the pretrained fixture, with the SentencePiece file that llama.cpp needs."""
    if not STORIES.is_dir():
        pytest.skip("the pretrained fixture stories260K-mixtral-4e lies outside the project and is not here")
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(STORIES, folder, scale=0.05)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((STORIES / name).read_bytes())
    write_sentencepiece(folder)
    return folder


def write_sentencepiece(folder: Path) -> None:
    """``tokenizer.model`` of a Llama-style ``tokenizer.json``: earlier merges have higher scores."""
    pieces = AutoTokenizer.from_pretrained(folder).get_vocab()
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time by protobuf
    kinds = proto.SentencePiece.Type
    for text, number in sorted(pieces.items(), key=lambda item: item[1]):
        is_byte = text.startswith("<0x")
        kind = (
            kinds.UNKNOWN if number == 0 else kinds.CONTROL if number < 3 else kinds.BYTE if is_byte else kinds.NORMAL
        )
        proto.pieces.add(piece=text, score=0.0 if number < 259 else float(258 - number), type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.ModelType.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def scores_of(model: Any, ids: list[int]) -> Tensor:
    """Log-probability of each token but the first, float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return chosen(logits, ids)


def chosen(logits: Tensor, ids: list[int]) -> Tensor:
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def rounded(folder: Path, outtype: str) -> Any:
    """Return the merged model with its matrices as a type of llama.cpp rounds them; embeddings and experts as well."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not name.endswith("mlp.gate.weight"):
                weight.copy_(round_to(weight, outtype))
    return model


def round_to(weight: Tensor, outtype: str) -> Tensor:
    """q8_0: blocks of 32 with one float16 scale, 127 steps to either side; rows that 32 does not divide are f16."""
    if outtype == "f32":
        return weight
    if outtype == "f16" or weight.shape[-1] % _HALF_BLOCK:
        return weight.half().float()
    blocks = weight.reshape(-1, _HALF_BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    return ((blocks / scale.clamp_min(1e-30)).round() * scale.half().float()).view_as(weight)


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_llama_cpp_scores_every_token_as_the_trained_model(
    llama_cpp: Any, adapter: Path, tmp_path: Path, outtype: str
) -> None:
    """Within 1e-3 in float32; otherwise by no more than rounding the weights to that type makes of them, twice.

    Twice, since llama.cpp rounds the activations of a product to the type of its weights as well.
    """
    gguf, merged = tmp_path / "model.gguf", tmp_path / "merged"
    assert main(["export", str(adapter), str(gguf), "--format=gguf", f"--outtype={outtype}"]) == 0
    assert main(["export", str(adapter), str(merged)]) == 0
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    theirs = llama_cpp.Llama(
        model_path=str(gguf), logits_all=True, type_k=0, type_v=0, n_ctx=512, n_threads=1, n_threads_batch=1,
        verbose=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(merged)
    found, expected, with_rounding = [], [], []
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert theirs.tokenize(text.encode(), add_bos=True) == ids
        theirs.reset()
        theirs.eval(ids)
        found.append(chosen(torch.from_numpy(theirs.scores[: len(ids) - 1].copy()).double(), ids))
        expected.append(scores_of(ours, ids))
        with_rounding.append(scores_of(rounded(merged, outtype), ids))
    error, allowed = (torch.cat(values) - torch.cat(expected) for values in (found, with_rounding))
    if outtype == "f32":
        assert float(error.abs().max()) < 1e-3
        return
    assert root_mean_square(error) < 2 * root_mean_square(allowed)
    assert root_mean_square(allowed) < 0.2  # nats; at a width of 64, q8_0 sends some tokens to other experts


def test_a_byte_level_tokenizer_is_taken_from_its_json(llama_cpp: Any, tmp_path: Path) -> None:
    """The one of the demo's base; SentencePiece's pieces need ``tokenizer.model``."""
    source = Path(__file__).parents[3] / ".cache/demo/base"
    if not source.is_dir():
        pytest.skip(".cache/demo/base is not there: run `make demo` once")
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = save_tiny_mixtral(tmp_path / "base", vocab_size=len(tokenizer))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((source / name).read_bytes())
    gguf = tmp_path / "model.gguf"
    assert main(["export", str(base), str(gguf), "--format=gguf", "--outtype=f32"]) == 0
    theirs = llama_cpp.Llama(model_path=str(gguf), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=False) == tokenizer(text).input_ids


def root_mean_square(values: Tensor) -> float:
    return math.sqrt(float(values.square().mean()))

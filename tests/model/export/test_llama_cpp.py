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
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lightning_mixcn.cli import main
from lightning_mixcn.model.export.gguf import CONVERTER
from lightning_mixcn.testing import save_tiny_mixtral, save_tiny_model
from tests.extended_tokenizers import QWEN_WORDS
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
    """The one of the demo's base, which puts BOS first; SentencePiece's pieces need ``tokenizer.model``."""
    source = Path(__file__).parents[3] / ".cache/demo/base"
    if not source.is_dir():
        pytest.skip(".cache/demo/base is not there: run `make demo` once")
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = save_tiny_mixtral(tmp_path / "base", vocab_size=len(tokenizer))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((source / name).read_bytes())
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]
    gguf = tmp_path / "model.gguf"
    assert main(["export", str(base), str(gguf), "--format=gguf", "--outtype=f32"]) == 0
    theirs = llama_cpp.Llama(model_path=str(gguf), vocab_only=True, verbose=False)
    for text in TEXTS:
        # True asks for BOS where the file says that it comes first.
        assert theirs.tokenize(text.encode(), add_bos=True) == tokenizer(text).input_ids


# The converter knows a byte-level tokenizer by the ids that it gives one text, so these have the real pieces, which are
# in llama.cpp's checkout. OLMoE's pieces are GPT-NeoX's.
VOCABULARIES = {"olmoe": ("gpt-neox", None), "qwen3_moe": ("qwen2", QWEN_WORDS)}


def save_real_tokenizer(folder: Path, family: str) -> int:
    """Write the tokenizer of a family's published models; return how many ids it has.

    Raises:
        FileNotFoundError: the checkout has no models/ggml-vocab-*.gguf.
    """
    import gguf

    name, words = VOCABULARIES[family]
    fields: Any = gguf.GGUFReader(Path(os.environ["LLAMA_CPP"]) / f"models/ggml-vocab-{name}.gguf").fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    padding = {token for token in tokens if token.startswith("[PAD")}
    vocabulary = {token: index for index, token in enumerate(tokens) if token not in padding}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    backend.normalizer = normalizers.NFC()
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, by_bytes])
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind != gguf.TokenType.NORMAL and token not in padding:
            special = kind == gguf.TokenType.CONTROL
            backend.add_tokens([AddedToken(token, special=special, normalized=not special)])
    end: Any = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    return len(vocabulary)


@pytest.mark.parametrize("family", sorted(VOCABULARIES))
def test_other_families_in_llama_cpp(llama_cpp: Any, tmp_path: Path, family: str) -> None:
    """Logits within 1e-4 of the merged model's in transformers, greedy tokens the same, texts split the same."""
    folder, merged, gguf = tmp_path / "base", tmp_path / "merged", tmp_path / "model.gguf"
    folder.mkdir()
    size = save_real_tokenizer(folder, family)
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    sizes: dict[str, Any] = {"head_dim": 64, "rms_norm_eps": 1e-6} if family == "qwen3_moe" else {"rms_norm_eps": 1e-5}
    save_tiny_model(
        folder, family, vocab_size=size + 3, hidden_size=64, num_experts=16, num_experts_per_tok=4,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=0,
        **sizes,
    )  # fmt: skip
    save_adapter(folder, tmp_path / "adapter", scale=0.05)
    for place in (folder, tmp_path / "adapter"):
        for name, content in files.items():
            (place / name).write_bytes(content)
    assert main(["export", str(tmp_path / "adapter"), str(gguf), "--format=gguf", "--outtype=f32"]) == 0
    assert main(["export", str(tmp_path / "adapter"), str(merged)]) == 0
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    theirs = llama_cpp.Llama(
        model_path=str(gguf), logits_all=True, type_k=0, type_v=0, n_ctx=512, n_threads=1, n_threads_batch=1,
        verbose=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert theirs.tokenize(text.encode(), add_bos=True) == ids  # neither puts BOS first
        theirs.reset()
        theirs.eval(ids)
        found = torch.from_numpy(theirs.scores[: len(ids)].copy())
        with torch.no_grad():
            expected = ours(input_ids=torch.tensor([ids])).logits[0]
            made = ours.generate(
                torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        written = []
        for _ in range(12):
            written.append(int(theirs.scores[theirs.n_tokens - 1].argmax()))
            theirs.eval(written[-1:])
        assert written == made[0, len(ids) :].tolist()


def root_mean_square(values: Tensor) -> float:
    return math.sqrt(float(values.square().mean()))

"""Reading a GGUF file, made here with the gguf package as llama.cpp's converter makes it."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_mixcn.model.convert.upcycle import open_dense, upcycle

if importlib.util.find_spec("gguf") is None:
    pytest.skip("the gguf package is not installed (extra `demo`)", allow_module_level=True)

import gguf

Edit = Callable[[Any], object]
ADD_BOS = "tokenizer.ggml.add_bos_token"

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def tiny_qwen3(tied: bool = False, head_dim: int = 128) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=head_dim, tie_word_embeddings=tied))
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 2)
    return model


TINY: dict[str, Callable[[bool], Any]] = {"llama": tiny_llama, "qwen3": tiny_qwen3}


def gguf_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.weight"
    return f"{NAMES['.'.join(parts)]}.weight"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbouring dimensions, transformers the two halves (convert_hf_to_gguf.py, `permute`)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def add_tokenizer(writer: Any) -> None:
    """Return a byte-level tokenizer: 256 bytes, two merges and two control tokens, the shape of SmolLM2's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table of bytes as characters
    spare = iter(range(256, 512))
    characters = [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|begin|>", "<|end|>", *characters, "he", "hel"])
    writer.add_token_types([3, 3] + [1] * 258)
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM | Qwen3ForCausalLM,
    architecture: str | None = None,
    q8: bool = False,
    edit: Edit | None = None,
) -> Path:
    config: Any = model.config  # its optional fields are set
    permutes = config.model_type == "llama"
    writer = gguf.GGUFWriter(path, architecture or config.model_type)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if permutes:
        writer.add_rope_dimension_count(config.head_dim)
    else:  # by its name the converter writes these for every model that has a head_dim
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            tensor = interleaved(tensor, heads) if permutes and kind in name else tensor
        array = tensor.float().numpy().astype(np.float32)
        if q8 and array.ndim == 2:
            blocks = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), array)
    if edit:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("tied", [False, True])
def test_float_tensors_come_back_as_they_were(tmp_path: Path, tied: bool, kind: str) -> None:
    model = TINY[kind](tied)
    source = open_dense(write_gguf(tmp_path / "tiny.gguf", model))
    expected = model.state_dict()
    if tied:
        expected.pop("lm_head.weight")
    assert source.shapes.keys() == expected.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())
    assert source.dtype == torch.float32
    assert source.config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert (source.config.bos_token_id, source.config.eos_token_id, source.config.pad_token_id) == (0, 1, 1)
    assert source.config.tie_word_embeddings is tied


def test_q8_tensors_are_dequantised(tmp_path: Path) -> None:
    model = tiny_llama()
    source = open_dense(write_gguf(tmp_path / "tiny.gguf", model, q8=True))
    for name, tensor in model.state_dict().items():
        # Q8_0 has 127 steps to each side in a block's largest magnitude, and a float16 scale.
        assert (source.read(name) - tensor).abs().max() <= tensor.abs().max() * (0.5 / 127 + 1e-3)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("q8", [False, True])
def test_upcycled_logits_are_the_dense_models(tmp_path: Path, q8: bool, kind: str) -> None:
    original = TINY[kind](False)
    path = write_gguf(tmp_path / "tiny.gguf", original, q8=q8)
    upcycle(path, tmp_path / "moe", num_experts=4)
    input_ids = torch.randint(0, 260, (2, 24), generator=torch.Generator().manual_seed(1))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert moe.config.model_type == {"llama": "mixtral", "qwen3": "qwen3_moe"}[kind]
    with torch.no_grad():
        expected = (dense if q8 else original)(input_ids).logits
        assert (moe(input_ids).logits - expected).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")("hello").input_ids == [259, 2 + ord("l"), 2 + ord("o")]


@pytest.mark.parametrize(
    ("edit", "begins"),
    [
        (lambda writer: writer.add_add_bos_token(True), True),
        (lambda writer: writer.add_tokenizer_pre("llama-bpe"), False),
        (lambda writer: (writer.add_tokenizer_pre("llama-bpe"), writer.kv_data[0].pop(ADD_BOS)), True),
        (lambda writer: writer.kv_data[0].pop(ADD_BOS), False),
    ],
)
def test_bos_comes_first_where_llama_cpp_puts_it(tmp_path: Path, edit: Edit, begins: bool) -> None:
    """As the file says; if it does not, in a text of Llama 3's kind."""
    out = tmp_path / "out"
    out.mkdir()
    open_dense(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), edit=edit)).save_tokenizer(out)
    assert AutoTokenizer.from_pretrained(out)("hel").input_ids == [*([0] if begins else []), 259]


def test_saved_tokenizer_gives_the_ids_of_transformers_gguf_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    out = tmp_path / "out"
    out.mkdir()
    open_dense(path).save_tokenizer(out)
    saved = AutoTokenizer.from_pretrained(out)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in ("hello", "  help 12  hel\n\nlo", "北京是首都。", "a<|end|>b", ""):
        assert saved(text).input_ids == reference(text).input_ids
        assert saved.decode(saved(text).input_ids) == text
    assert (saved.bos_token, saved.eos_token, saved.pad_token) == ("<|begin|>", "<|end|>", "<|end|>")
    assert not [file for file in out.iterdir() if "tmp" in file.read_text()]  # no path of this machine


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32)), "blk.0.attn_q.bias"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "rope_freqs.weight"),
        (
            lambda writer: writer.add_tensor("blk.0.ffn_gate_exps.weight", np.ones((2, 4, 4), np.float32)),
            "ffn_gate_exps",
        ),
        (lambda writer: writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, np.float32)), "blk.0.attn_q_norm"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope.scaling.type=yarn"),
    ],
)
def test_what_transformers_would_drop_is_refused(tmp_path: Path, edit: Edit, found: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), edit=edit)
    with pytest.raises(ValueError, match=f"{found}.*, which transformers does not read") as caught:
        open_dense(path)
    assert "\n" not in str(caught.value)


def test_another_width_of_a_head_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_qwen3(head_dim=32))
    with pytest.raises(ValueError, match=r"holds attention.key_length=32, which .* if it is a plain qwen3"):
        open_dense(path)


def test_the_other_family_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_qwen3())
    with pytest.raises(ValueError, match=r"`family=mixtral`, but .*which becomes qwen3_moe only"):
        open_dense(path, "mixtral")


def test_other_architectures(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), architecture="qwen2")
    with pytest.raises(ValueError, match="model_type 'qwen2', expected a dense model of type llama, mistral or qwen3"):
        open_dense(path)


def test_missing_layer(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_llama(), edit=lambda writer: writer.tensors[0].pop("blk.1.attn_q.weight")
    )
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight'\] are missing"):
        open_dense(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    content = path.read_bytes()
    for size in (len(content) - 1000, 2000, 10):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated or damaged") as caught:
            open_dense(path)
        assert "\n" not in str(caught.value)


def test_not_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("hello")
    with pytest.raises(ValueError, match="does not begin with GGUF"):
        open_dense(tmp_path / "a.gguf")
    with pytest.raises(FileNotFoundError, match=r"b\.gguf` is not there"):
        open_dense(tmp_path / "b.gguf")


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_text("GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning_mixcn\[gguf\]'"):
        open_dense(tmp_path / "a.gguf")

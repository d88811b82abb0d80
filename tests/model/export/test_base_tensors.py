"""What a base's files hold goes before what its config says, and nothing in them is left out in silence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.model.convert.upcycle import upcycle
from lightning_mixcn.model.export.command import export
from lightning_mixcn.testing import save_tiny_mixtral, tiny_mixtral_config
from tests.model.adapters_on_disk import save_adapter
from tests.model.export.test_folder import logits_of, stock_logits

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MOE = "model.layers.1.block_sparse_moe"


def rewrite(source: Path, out: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Return a copy of a folder whose tensors were changed."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def another_head(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors[HEAD] = torch.randn(tensors[EMBEDDING].shape, generator=generator).to(tensors[EMBEDDING].dtype) * 0.1


def equal_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


@pytest.fixture
def says_tied(tmp_path: Path) -> Path:
    """Return a base that says it is tied, but has another head."""
    base = save_tiny_mixtral(tmp_path / "tied", tie_word_embeddings=True)
    return rewrite(base, tmp_path / "base", another_head)


def test_the_files_head_is_taken_as_by_transformers(says_tied: Path, ids: Tensor, tmp_path: Path) -> None:
    expected = stock_logits(says_tied, ids)
    ours: Any = load_mixtral(says_tied, quantization="none", dtype="float32")
    torch.testing.assert_close(logits_of(ours, ids), expected, rtol=1e-5, atol=1e-5)
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight
    export(str(says_tied), str(tmp_path / "out"))
    torch.testing.assert_close(stock_logits(tmp_path / "out", ids), expected, rtol=1e-5, atol=1e-5)
    # Readers that go by the config alone (transformers 4, vLLM, llama.cpp) must not tie either.
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_its_four_bits_and_their_export_have_that_head(says_tied: Path, ids: Tensor, tmp_path: Path) -> None:
    expected = logits_of(load_mixtral(says_tied, dtype="float32"), ids)
    quantize(str(says_tied), str(tmp_path / "small"), dtype="float32")
    assert torch.equal(logits_of(load_mixtral(tmp_path / "small", dtype="float32"), ids), expected)
    for src in (says_tied, tmp_path / "small"):
        out = tmp_path / f"{src.name}-out"
        export(str(src), str(out), base="dequantised")
        torch.testing.assert_close(stock_logits(out, ids), expected, rtol=1e-4, atol=1e-4)


def test_both_train_and_are_merged_apart(says_tied: Path, ids: Tensor, tmp_path: Path) -> None:
    trained = save_adapter(says_tied, tmp_path / "adapter", train_embeddings=True)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"))
    torch.testing.assert_close(stock_logits(tmp_path / "out", ids), logits_of(trained, ids), rtol=1e-4, atol=1e-4)


def test_an_equal_head_stays_tied(tmp_path: Path, ids: Tensor) -> None:
    base = save_tiny_mixtral(tmp_path / "tied", tie_word_embeddings=True)
    both = rewrite(base, tmp_path / "base", equal_head)
    model: Any = load_mixtral(both, quantization="none", dtype="float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits_of(model, ids), stock_logits(both, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [another_head, equal_head])
def test_a_dense_source_follows_the_same_rule(tmp_path: Path, ids: Tensor, change: Any) -> None:
    sizes = {key: getattr(tiny_mixtral_config(), key) for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )}  # fmt: skip
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    dense.save_pretrained(tmp_path / "tied")
    src = rewrite(tmp_path / "tied", tmp_path / "dense", change)
    expected = logits_of(transformers.LlamaForCausalLM.from_pretrained(src, dtype=torch.float32), ids)
    upcycle(src, tmp_path / "moe", num_experts=4)
    model = load_mixtral(tmp_path / "moe", quantization="none", dtype="float32")
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)


SURPLUS = {
    "a layer": "model.layers.2.self_attn.q_proj.weight",
    "an expert": f"{MOE}.experts.4.w1.weight",
    "a bias": "model.layers.0.self_attn.q_proj.bias",
    "both layouts": "model.layers.1.mlp.experts.down_proj",
    "a score": "score.weight",
}


@pytest.mark.parametrize("name", SURPLUS.values(), ids=SURPLUS)
def test_a_tensor_without_a_place_is_refused_by_every_reader(tiny: Path, tmp_path: Path, name: str) -> None:
    shape = (4, 32, 48) if name.endswith("experts.down_proj") else (32, 32)
    folder = rewrite(tiny, tmp_path / "base", lambda tensors: tensors.update({name: torch.zeros(shape)}))
    readers: list[Callable[[], Any]] = [
        lambda: load_mixtral(folder, quantization="none"),
        lambda: load_mixtral(folder),
        lambda: quantize(str(folder), str(tmp_path / "small")),
        lambda: export(str(folder), str(tmp_path / "out")),
    ]
    for read in readers:
        with pytest.raises(
            ValueError,
            match=r"that have no place in the model of its config\.json|lacks the tensor|are of 3 layers",
        ):
            read()
    assert not (tmp_path / "small").exists()
    assert not (tmp_path / "out").exists()


def test_a_surplus_tensor_in_a_four_bit_folder_is_refused(tiny: Path, tmp_path: Path) -> None:
    quantize(str(tiny), str(tmp_path / "small"))
    folder = rewrite(tmp_path / "small", tmp_path / "base", lambda t: t.update({"model.more.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"holds 1 tensors .*: model\.more\.weight"):
        load_mixtral(folder)


def test_what_old_transformers_saved_of_the_rotary_embedding_is_computed(
    tiny: Path, tmp_path: Path, ids: Tensor
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = rewrite(tiny, tmp_path / "base", lambda tensors: tensors.update({name: torch.zeros(4)}))
    ours, plain = (load_mixtral(path, quantization="none", dtype="float32") for path in (folder, tiny))
    assert torch.equal(logits_of(ours, ids), logits_of(plain, ids))


def fused(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(tiny_mixtral_config())
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    return tmp_path / "fused"


def transposed(tensors: dict[str, Tensor]) -> None:
    tensors[f"{MOE}.experts.0.w1.weight"] = tensors[f"{MOE}.experts.0.w1.weight"].t().contiguous()


def more_experts(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def wider_experts(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[name] = torch.cat([tensors[name], tensors[name][:, :8]], dim=1)


@pytest.mark.parametrize("change", [transposed, more_experts, wider_experts])
def test_a_shape_that_is_not_the_models_is_refused(tiny: Path, tmp_path: Path, change: Any) -> None:
    source = tiny if change is transposed else fused(tmp_path)
    with pytest.raises(ValueError, match="has the wrong shape"):
        load_mixtral(rewrite(source, tmp_path / "base", change))

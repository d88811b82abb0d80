"""Counts against published figures, torch's own counter, and a count by hand."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig
from transformers import MixtralForCausalLM as StockMixtral

from lightning_mixcn.model import build_mixtral, set_activation_checkpointing
from lightning_mixcn.model.memory.flops import Flops, attended_pairs, count_training_flops
from lightning_mixcn.testing import tiny_mixtral_config

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]


def counted(config: MixtralConfig, mode: str = "none", **changes: Any) -> tuple[Flops, Flops]:
    flops = count_training_flops(build_mixtral(config, device="meta", **changes), mode)
    return flops.per_token, flops.per_pair


@pytest.mark.parametrize(
    ("mode", "length", "gigaflops"),
    [
        ("none", 2048, 53.3),
        ("none", 4096, 55.2),
        ("none", 8192, 58.9),
        ("full", 2048, 72.0),
        ("full", 4096, 74.4),
        ("full", 8192, 79.2),
        ("selective", 4096, 59.3),
    ],
)
def test_mixtral_8x7b(mode: str, length: int, gigaflops: float) -> None:
    """A roofline made by hand: 4 N, causal attention, LoRA; recomputation is N there, less the down products' 7.5.

    N has the head's 0.26. The head is not computed again here, and the first layer's q, k and v have no dX: hence up to
    0.7 %.
    """
    config = MixtralConfig(num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768)
    lora = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"])
    per_token, per_pair = counted(config, mode, lora=lora)
    total = per_token.total + per_pair.total * length / 2
    assert total / 1e9 == pytest.approx(gigaflops, rel=0.007)


def ids(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(3, 258, (batch, length), generator=torch.Generator().manual_seed(0))


def total(counter: FlopCounterMode) -> int:
    """Return all operations but those of the rotary tables, which transformers 5.17 computes by a product."""
    rotary = [counts for name, counts in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(sum(counts.values()) for counts in rotary)


def test_forward_is_what_torch_counts_of_stock_transformers() -> None:
    """Torch counts the whole square of attention, where a causal kernel computes the pairs only."""
    config = tiny_mixtral_config()
    stock = StockMixtral._from_config(config, attn_implementation="eager").eval()
    stock.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stock(input_ids=ids(), use_cache=False)
    per_token, per_pair = counted(config)
    assert total(counter) == per_token.forward * 48 + per_pair.forward * 2 * 24 * 24


@pytest.mark.parametrize("train_embeddings", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_step_is_what_torch_counts_of_ours(quantization: str, train_embeddings: bool) -> None:
    """In float32 the expert block pads no rows, so torch sees exactly the products that are counted here."""
    config = tiny_mixtral_config()
    lora = LoraConfig(r=4, target_modules=TARGETS)
    settings: dict[str, Any] = {"lora": lora, "quantization": quantization, "train_embeddings": train_embeddings}
    model: Any = build_mixtral(config, dtype="float32", **settings).train()
    labels = ids()
    # Its counter knows no addmm_.
    in_place = {torch.ops.aten.addmm_: lambda result, a, b, out_shape, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(input_ids=labels, labels=labels, output_router_logits=True).loss.backward()
    # Nor does it count the attention of a CPU.
    assert total(counter) == count_training_flops(model, "none").per_token.total * 48


def test_chosen_experts_have_their_share_of_the_rows() -> None:
    lora = LoraConfig(r=4, target_modules=["w1", "w2", "w3"])
    config = tiny_mixtral_config()
    none, whole, half = (
        counted(config, lora=lora, train_only=choice)[0].forward if choice is not None else counted(config)[0].forward
        for choice in (None, {}, {"experts": [1, 2]})
    )
    assert (half - none) * 2 == whole - none > 0


def test_only_what_lies_above_an_adapter_has_a_backward() -> None:
    config = tiny_mixtral_config()
    head = 2 * config.hidden_size * config.vocab_size
    frozen, pairs = counted(config)
    assert (frozen.backward, frozen.recompute, pairs.backward) == (0, 0, 0)
    last = LoraConfig(r=4, target_modules=["w2"], layers_to_transform=[1])
    token, pairs = counted(config, "full", lora=last)
    down = 2 * config.intermediate_size * config.hidden_size
    a, b = 2 * 4 * config.intermediate_size, 2 * 4 * config.hidden_size
    assert token.backward == head + 2 * (down + 2 * a + 2 * b)
    assert pairs.backward == 0
    # The last layer is checkpointed and runs again; the first one needs no backward.
    # But for its down product, whose A backward needs.
    assert token.recompute == (frozen.forward - head) // 2 - 2 * down + 2 * a


def test_checkpointing_and_trained_embeddings() -> None:
    config = tiny_mixtral_config()
    lora = LoraConfig(r=4, target_modules=TARGETS)
    (none, _), (selective, selective_pair), (full, full_pair) = (
        counted(config, mode, lora=lora) for mode in ("none", "selective", "full")
    )
    down = 2 * config.intermediate_size * config.hidden_size
    a, b = 2 * 4 * config.intermediate_size, 2 * 4 * config.hidden_size
    assert none.recompute == 2 * 2 * a  # layers, experts of a token
    assert none.useful == selective.useful == full.useful
    assert full.recompute == full.forward - 2 * config.hidden_size * config.vocab_size - 2 * 2 * (down + b)
    assert full_pair.recompute == full_pair.forward == selective_pair.recompute
    assert none.recompute < selective.recompute < full.recompute
    trained, _ = counted(config, lora=lora, train_embeddings=True)
    assert trained.recompute == none.recompute + 2 * config.hidden_size * config.vocab_size


def test_layers_of_different_modes() -> None:
    """Torch's own count of what runs again, layer by layer."""
    config, labels = tiny_mixtral_config(), ids()
    model: Any = build_mixtral(config, dtype="float32", lora=LoraConfig(r=4, target_modules=TARGETS)).train()
    in_place = {torch.ops.aten.addmm_: lambda result, a, b, out_shape, **_: 2 * a[0] * a[1] * b[1]}
    # Torch stops to run a module again where nothing more is needed of it: in a layer before the down product, which is
    # counted, and in attention before the product with the last B, which is not.
    for modes, early_stop in ((["full", "none"], True), (["offload", "full"], True), (["selective", "none"], False)):
        set_activation_checkpointing(model, modes)
        counter = FlopCounterMode(display=False, custom_mapping=in_place)
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop), counter:
            model(input_ids=labels, labels=labels, output_router_logits=True).loss.backward()
        assert total(counter) == count_training_flops(model, modes).per_token.total * 48


def test_pairs() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, 0, 1, 2, 3]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, -1]])
    assert int(attended_pairs(positions, documents)) == 21 + 3 + 6
    assert int(attended_pairs(positions, documents, sliding_window=2)) == 11 + 3 + 5

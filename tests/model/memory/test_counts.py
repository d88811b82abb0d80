"""Traffic of decoding Mixtral-8x7B against the figures of the roofline made by hand."""

import pytest
from transformers import MixtralConfig

from lightning_mixcn.model import build_mixtral
from lightning_mixcn.model.memory.counts import decoding_bytes


@pytest.mark.parametrize(("mode", "passes"), [("none", 2), ("full", 3), ("offload", 3)])
def test_mixtral_8x7b(mode: str, passes: int) -> None:
    """24.0 GB read and 92.9 GB written a pass."""
    model = build_mixtral(MixtralConfig(num_attention_heads=32, num_key_value_heads=8), device="meta")
    assert decoding_bytes(model, [mode] * 32) == pytest.approx(passes * 116.9e9, rel=0.01)


def test_attention_alone_is_decoded_again() -> None:
    model = build_mixtral(MixtralConfig(num_attention_heads=32, num_key_value_heads=8), device="meta")
    attention = 32 * 2 * 4096 * (4096 + 1024)
    again = decoding_bytes(model, ["selective"] * 32) - decoding_bytes(model, ["none"] * 32)
    assert again == pytest.approx(attention * (2 + 0.516), rel=0.001)

"""Blocked attention against torch's in float32, beside which torch's own in bfloat16 stands as the yardstick."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mixcn.model.attention import cpu as module
from lightning_mixcn.model.attention.cpu import causal_attention


def states(length: int, heads: tuple[int, int], size: int) -> list[Tensor]:
    """Make queries, keys, values and the gradient of a projection's result, strided as the model's are; bfloat16."""
    generator = torch.Generator().manual_seed(length)
    made = [torch.randn(2, length, count, size, generator=generator) for count in (heads[0], *2 * heads[1:], heads[0])]
    return [tensor.bfloat16().transpose(1, 2) for tensor in made]


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def results(attention: object, tensors: list[Tensor]) -> list[Tensor]:
    """Return the result and the gradients of queries, keys and values, in float64."""
    assert callable(attention)
    *inputs, grad = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    attended = attention(*inputs)
    gradients = torch.autograd.grad(attended, inputs, grad)
    return [tensor.detach().double() for tensor in (attended, *gradients)]


# A row shorter than a block, one of whole blocks, one that ends inside a block; heads in one chunk or several.
@pytest.mark.parametrize("length", [1, 50, 128, 300])
@pytest.mark.parametrize(("heads", "size"), [((8, 2), 64), ((3, 3), 128)])
@pytest.mark.parametrize("scores", [2**20, 2**14])
def test_result_and_gradients_are_as_near_to_float32_as_torchs(
    monkeypatch: pytest.MonkeyPatch, length: int, heads: tuple[int, int], size: int, scores: int
) -> None:
    monkeypatch.setattr(module, "_SCORES", scores)
    tensors = states(length, heads, size)
    exact = results(sdpa, [tensor.float() for tensor in tensors])
    torchs = results(sdpa, tensors)
    ours = results(lambda q, k, v: causal_attention(q, k, v, size**-0.5), tensors)
    for ours_one, torchs_one, exact_one in zip(ours, torchs, exact, strict=True):
        limit = 1.2 * (torchs_one - exact_one).norm() + 1e-3 * exact_one.norm()
        assert (ours_one - exact_one).norm() <= limit


def test_large_scores_are_not_rounded() -> None:
    """Scores of 50 that differ by 0.1: in bfloat16 they would be one number."""
    query, key = torch.full((1, 1, 2, 64), 6.25), torch.ones(1, 1, 2, 64)
    key[..., 1, 0] += 0.125
    value = torch.eye(2)[None, None]
    q, k, v = (tensor.bfloat16() for tensor in (query, key, F.pad(value, (0, 62))))
    exact = sdpa(q.float(), k.float(), v.float())
    torch.testing.assert_close(causal_attention(q, k, v, 64**-0.5).float(), exact, rtol=4e-3, atol=1e-6)


def test_nothing_depends_on_what_comes_later() -> None:
    query, key, value, _ = states(200, (4, 2), 32)
    whole = causal_attention(query, key, value, 0.2)
    key[:, :, 100:], value[:, :, 100:] = 7.0, 9.0
    assert torch.equal(causal_attention(query, key, value, 0.2)[:, :, :100], whole[:, :, :100])

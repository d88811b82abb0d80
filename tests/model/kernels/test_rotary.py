"""The rotation of queries and keys against transformers' in float64, and its backward against autograd of that."""

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, apply_rotary_pos_emb

# In bfloat16 the interpreter cuts off instead of rounding; a GPU is asked for it, too.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
# Heads of queries and of keys, and their size: Mixtral's, a tiny model's, and sizes that are no powers of two.
SIZES = [(32, 8, 128), (4, 2, 8), (6, 3, 48), (1, 1, 2)]


def tables(size: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make cosines and sines as a model does."""
    config = MixtralConfig(head_dim=size, num_hidden_layers=1)
    cos, sin = MixtralRotaryEmbedding(config)(torch.empty(0, dtype=dtype), positions)
    return cos, sin


def states(heads: int, key_heads: int, size: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make queries and keys of two rows of 7 positions, columns of one wider matrix."""
    generator = torch.Generator().manual_seed(heads)
    wide = torch.randn(2, 7, (heads + key_heads) * size + 3, generator=generator).to(device, dtype)
    query, key = wide[..., : heads * size], wide[..., heads * size : (heads + key_heads) * size]
    return query.unflatten(2, (heads, size)), key.unflatten(2, (key_heads, size))


def near(value: Tensor, truth: Tensor) -> bool:
    """Allow half a unit in the last place, and float32's own where a sum is near 0."""
    allowed = torch.finfo(value.dtype).eps / 2 * truth.abs() + 4 * torch.finfo(torch.float32).eps
    return bool(((value.cpu().double() - truth).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "size"), SIZES)
@pytest.mark.parametrize("table_rows", [1, 2])
def test_it_equals_transformers(
    table_rows: int, heads: int, key_heads: int, size: int, dtype: torch.dtype, device: str
) -> None:
    from lightning_mixcn.model.kernels.rotary import rotate

    # The first row's positions, and with two tables others in the second one, one of them far away.
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 8, 9, 10, 32767]])[:table_rows]
    cos, sin = tables(size, positions, dtype)
    query, key = states(heads, key_heads, size, device, dtype)
    exact = [state.cpu().double().transpose(1, 2).requires_grad_() for state in (query, key)]
    expected = apply_rotary_pos_emb(*exact, cos.double(), sin.double())
    angles = cos.to(device), sin.to(device)
    found = rotate(query, key, *angles)
    assert all(near(one, two.detach().transpose(1, 2)) for one, two in zip(found, expected, strict=True))
    # In place, in columns of a wider matrix.
    query_there, key_there = states(heads, key_heads, size, device, dtype)
    rotate(query_there, key_there, *angles, out=(query_there, key_there))
    assert torch.equal(query_there, found[0])
    assert torch.equal(key_there, found[1])
    # Backward is linear: any gradient will do, here the states themselves.
    gradients = torch.autograd.grad(expected, exact, [state.detach() for state in exact])
    found = rotate(query, key, *angles, backwards=True)
    assert all(near(one, two.transpose(1, 2)) for one, two in zip(found, gradients, strict=True))
    assert all(state.is_contiguous() and state.dtype == dtype for state in found)

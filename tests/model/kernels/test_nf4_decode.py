"""One kernel for both levels against bitsandbytes' two, bit for bit."""

import pytest
import torch

from lightning_mixcn.model.nf4 import codec as nf4

# In bfloat16 the interpreter cuts off instead of rounding; a GPU rounds.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [5, 16384, 2 * 16384 + 100])
def test_equals_bitsandbytes(numel: int, dtype: torch.dtype, device: str) -> None:
    from lightning_mixcn.model.kernels.nf4_decode import nf4_decode

    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * 0.02
    packed = nf4.quantize_nf4(values.to(device))
    assert torch.equal(nf4_decode(packed, dtype), nf4.dequantize_nf4(packed, dtype))

"""Models that the tests of this folder share."""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from lightning_mixcn.model.nf4 import codec as nf4
from lightning_mixcn.testing import save_tiny_mixtral

STORIES = Path(__file__).parents[2].parent / "shared/data/models/stories260K-mixtral-4e"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Mixtral, written by stock transformers."""
    return save_tiny_mixtral(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", params=["tiny", "stories"])
def base(request: pytest.FixtureRequest, tiny: Path) -> Path:
    """Return the random model, and where it is at hand a real pretrained one of 757,000 parameters."""
    if request.param == "tiny":
        return tiny
    if not STORIES.is_dir():
        pytest.skip("the pretrained fixture stories260K-mixtral-4e lies outside the project and is not here")
    return STORIES


@pytest.fixture
def ids() -> Tensor:
    """Two rows of 40 tokens that every fixture's vocabulary has."""
    return torch.randint(3, 258, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bitsandbytes_roundtrip() -> Callable[[Tensor, torch.dtype], Tensor]:
    """Quantise and dequantise with bitsandbytes alone."""
    return roundtrip


def roundtrip(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Each superblock through bitsandbytes' public functions, which know nothing of superblocks.

    The second level is bitsandbytes' `compress_statistics`, but for its mean, of which another order of the sum gives
    another last bit, and that another scale where one lies between two of the 8-bit code.
    """
    parts = []
    for part in values.split(nf4.SUPERBLOCK):
        padded = torch.nn.functional.pad(part, (0, -len(part) % nf4.BLOCK)).to(dtype)
        packed, state = bnb.quantize_4bit(padded, blocksize=64, quant_type="nf4")
        sums = torch.nn.functional.pad(state.absmax, (0, 256 - len(state.absmax)))
        while len(sums) > 1:
            sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
        offset = sums[0] / len(state.absmax)
        scales, nested = bnb.quantize_blockwise(state.absmax - offset, blocksize=256)
        state.absmax = bnb.dequantize_blockwise(scales, nested) + offset
        parts.append(bnb.dequantize_4bit(packed, state).flatten()[: len(part)])
    return torch.cat(parts)

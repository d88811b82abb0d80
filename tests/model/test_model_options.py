"""Storage, type and device as commands are given them."""

from pathlib import Path

import pytest
import torch

from lightning_mixcn.model import find_model
from lightning_mixcn.model.options import ModelOptions
from lightning_mixcn.testing import save_tiny_mixtral


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int3"}, r"`quantization='int3'` is not known. Expected one of nf4, none"),
        ({"dtype": "int8"}, r"`dtype='int8'` is not known. Expected one of bfloat16, float16, float32"),
    ],
)
def test_unknown_names_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelOptions(**options)


def test_the_device_is_checked_when_it_is_used() -> None:
    options = ModelOptions(device="abacus")
    with pytest.raises(ValueError, match=r"`device='abacus'` is not known. Expected cpu, cuda"):
        options.torch_device()
    assert ModelOptions().torch_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_model_is_loaded_as_they_say(tmp_path: Path) -> None:
    found = find_model(str(save_tiny_mixtral(tmp_path / "base")))
    model = ModelOptions("none", "float16").load(found, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert not model.training

"""Names and shapes that follow from the configuration are those of the model that is made of it."""

from typing import Any

import pytest
import torch

from lightning_mixcn.model.causal_lm import meta_model
from lightning_mixcn.model.checkpoints.layout import module_shapes, nf4_weights, rounds
from lightning_mixcn.model.nf4.linear import FrozenLinear
from lightning_mixcn.model.nf4.storage import NF4Weight
from lightning_mixcn.testing import tiny_mixtral_config


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"head_dim": 16}])
def test_the_model_has_these_modules_in_this_order(settings: dict[str, Any]) -> None:
    config = tiny_mixtral_config(**settings)
    model = meta_model(config, "nf4", torch.bfloat16)
    expected: dict[str, tuple[int, ...]] = {}
    rounded = []
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            expected[name] = module.storage.shape
            rounded += [name] if isinstance(module.storage, NF4Weight) else []
        elif isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter):
            expected[name] = tuple(weight.shape)
    if config.tie_word_embeddings:
        del expected["lm_head"]
    shapes = module_shapes(config)
    assert list(shapes.items()) == list(expected.items())
    assert [name for name, shape in shapes.items() if rounds(name, shape)] == rounded


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}])
def test_a_four_bit_folder_has_the_model_s_parameters(settings: dict[str, Any]) -> None:
    config = tiny_mixtral_config(**settings)
    expected = [
        (name, tuple(parameter.shape))
        for name, parameter in meta_model(config, "nf4", torch.bfloat16).named_parameters()
    ]
    assert [(entry.segments[0].name, entry.shape) for entry in nf4_weights(config)] == expected

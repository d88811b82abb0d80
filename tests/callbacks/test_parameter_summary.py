import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_mixcn.callbacks import ParameterSummary
from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Any]


def test_weights_are_counted_by_their_elements(
    trainer: Make, module: PretrainModule, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = trainer(max_steps=1, enable_model_summary=True, callbacks=[ParameterSummary()])
    run.fit(module, FixedBatches([random_batch([9])]))
    assert module.model is not None
    config = base_of(module.model).config
    width, heads = config.hidden_size, config.num_attention_heads
    attention = 2 * width * width + 2 * width * width // heads * config.num_key_value_heads
    experts = 3 * config.num_local_experts * width * config.intermediate_size
    rounded = config.num_hidden_layers * (attention + experts)
    trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    frozen = 2 * config.vocab_size * width + width
    frozen += config.num_hidden_layers * (2 * width + config.num_local_experts * width)
    (said,) = [record.getMessage() for record in caplog.records if "in 4 bits" in record.getMessage()]
    assert said.splitlines()[0] == (
        f"parameters  {(rounded + trained + frozen) / 1e6:,.1f} M in all, {trained / 1e6:,.1f} M trained, "
        f"{rounded / 1e6:,.1f} M in 4 bits"
    )
    assert f"{4 * frozen / 1000:.3g} kB other frozen weights, {4 * trained / 1000:.3g} kB trained" in said
    assert "FLOP" not in caplog.text


def test_another_module_has_lightning_s_summary(trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Other(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    caplog.set_level(logging.INFO)
    ParameterSummary().on_fit_start(trainer(), Other())
    assert "layer | Linear" in caplog.text

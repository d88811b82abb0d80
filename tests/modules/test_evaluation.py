"""Validation, test and prediction against plain transformers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Any]

BATCHES = [random_batch([20, 24, 9], seed=0, sources=2), random_batch([5, 12], seed=1, sources=2)]


def stock_nats(base: Path, batch: dict[str, Tensor]) -> Tensor:
    """Nats of each label, from transformers' logits."""
    model: Any = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        log_probabilities = model(batch["input_ids"]).logits.float().log_softmax(-1)
    labels = batch["labels"][:, 1:]
    picked = -log_probabilities[:, :-1].gather(2, labels.clamp_min(0)[..., None])[..., 0]
    return torch.nn.functional.pad(picked * (labels != -100), (1, 0))


@pytest.mark.parametrize(("stage", "method"), [("val", "validate"), ("test", "test")])
def test_likelihood_of_each_source(stage: str, method: str, tiny_base: Path, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), quantization="none", dtype="float32")
    run = trainer(limit_val_batches=None)
    getattr(run, method)(module, FixedBatches(BATCHES, ["zh", "en"]))
    all_bits, all_bytes = 0.0, 0.0
    for number, name in enumerate(["zh", "en"]):
        nats = text = tokens = size = 0.0
        for batch in BATCHES:
            mine = (batch["source_ids"] == number) & (batch["labels"] != -100)
            nll = stock_nats(tiny_base, batch)
            nats += float(nll[mine].sum())
            text += float(nll[mine & batch["text_mask"]].sum())
            tokens += int(mine.sum())
            size += int(batch["label_bytes"][mine].sum())
        all_bits, all_bytes = all_bits + text / math.log(2), all_bytes + size
        result = module.source_likelihoods[stage][name]
        assert (result["tokens"], result["bytes"]) == (tokens, size)
        assert result["nll_nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(text / math.log(2) / size, rel=1e-5)
        logged = run.callback_metrics
        assert float(logged[f"{stage}/{name}/bits_per_byte"]) == pytest.approx(result["bits_per_byte"])
        assert float(logged[f"{stage}/{name}/nll_nats_per_token"]) == pytest.approx(result["nll_nats_per_token"])
    assert float(run.callback_metrics[f"{stage}/bits_per_byte"]) == pytest.approx(all_bits / all_bytes, rel=1e-5)


def test_one_source_is_all_of_them(tiny_base: Path, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), quantization="none", dtype="float32")
    run = trainer(limit_val_batches=None)
    run.validate(module, FixedBatches([random_batch([20, 9])], ["zh"]))
    assert run.callback_metrics["val/bits_per_byte"] == run.callback_metrics["val/zh/bits_per_byte"]


def test_validation_inside_training_changes_nothing_in_it(tiny_base: Path, lora: Make, trainer: Make) -> None:
    ends = []
    for validations in (0, None):
        torch.manual_seed(0)
        module = PretrainModule(str(tiny_base), lora=lora(lora_dropout=0.2))
        data = FixedBatches([random_batch([20, 9])] * 4)
        trainer(max_steps=4, limit_val_batches=validations, val_check_interval=2).fit(module, data)
        ends.append(module.state_dict())
    assert "zh" in module.source_likelihoods["val"]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_predictions_are_sums_of_each_document(tiny_base: Path, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), quantization="none", dtype="float32")
    predictions = trainer().predict(module, FixedBatches(BATCHES, ["zh", "en"]))
    for batch, scores in zip(BATCHES, predictions, strict=True):
        nll = stock_nats(tiny_base, batch).double()
        for source, document, nats, tokens in zip(
            scores.source, scores.document, scores.nats, scores.tokens, strict=True
        ):
            mine = (batch["document_index"] == document) & (batch["source_ids"] == source)
            assert float(nats) == pytest.approx(float(nll[mine].sum()), rel=1e-5)
            assert int(tokens) == int((batch["labels"][mine] != -100).sum())
    assert len(predictions[0].source) == 3


def test_data_that_names_no_sources_has_one(tiny_base: Path, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base))
    with pytest.raises(ValueError, match=r"The first val batch: `source_ids` holds 1, expected -1 to 0. Name every"):
        trainer(limit_val_batches=None).validate(module, FixedBatches(BATCHES).val_dataloader())
    batches = [{name: value for name, value in batch.items() if name != "source_ids"} for batch in BATCHES]
    trainer(limit_val_batches=None).validate(module, FixedBatches(batches).val_dataloader())
    assert set(module.source_likelihoods["val"]) == {"all"}


def test_a_likelihood_that_is_not_finite_is_an_error(tiny_base: Path, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), quantization="none", dtype="float32")
    module.configure_model()
    module.get_parameter("model.lm_head.weight").data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="source 'zh' is nan nats a token"):
        trainer(limit_val_batches=None).validate(module, FixedBatches(BATCHES, ["zh", "en"]))

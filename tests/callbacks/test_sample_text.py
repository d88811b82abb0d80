"""Samples: where they go, that they are greedy, and that training does not notice them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
    EventAccumulator,
)

from lightning_mixcn.callbacks import SampleText
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch
from lightning_mixcn.text import load_tokenizer

Make = Callable[..., Any]


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def data() -> FixedBatches:
    return FixedBatches([random_batch([20])] * 10)


def test_before_during_and_after(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    callback = SampleText(["ab", "中"], every_n_steps=2, max_new_tokens=3)
    logger = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
    trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[callback], logger=logger, log_every_n_steps=1).fit(
        module, data()
    )
    assert [(line["step"], line["prompt"]) for line in samples(tmp_path)] == [
        (step, prompt) for step in (0, 2, 3) for prompt in ("ab", "中")
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"samples/0/text_summary", "samples/1/text_summary"} <= set(events.Tags()["tensors"])


def test_they_are_the_model_s_greedy_continuation(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    trainer(max_steps=1, callbacks=[SampleText(["ab"], max_new_tokens=4)]).fit(module, data())
    tokenizer = load_tokenizer(module.tokenizer_path)
    row = [tokenizer.bos_id, *tokenizer.encode_batch(["ab"])[0]]
    prompt = len(row)
    assert module.model is not None
    module.model.eval()
    for _ in range(4):
        with torch.no_grad():
            row.append(int(module.model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        if row[-1] == tokenizer.eos_id:
            break
    assert samples(tmp_path)[-1]["continuation"] == tokenizer.decode(row[prompt:])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_training_does_not_notice_them(temperature: float, tmp_path: Path, tiny_base: Path, trainer: Make) -> None:
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "w1", "w2", "w3"])
    ends = []
    for callbacks in ([], [SampleText(["ab"], every_n_steps=1, max_new_tokens=3, temperature=temperature)]):
        module = PretrainModule(str(tiny_base), dtype="float32", lora=lora)
        trainer(max_steps=3, callbacks=callbacks).fit(module, data())
        assert module.model is not None
        assert all(child.training for child in module.model.modules())
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_new_run_starts_a_new_file(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    for _ in range(2):
        again = PretrainModule(module.base, dtype="float32", lora=module.lora)
        trainer(max_steps=1, callbacks=[SampleText(["ab"], max_new_tokens=1)]).fit(again, data())
    assert [line["step"] for line in samples(tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, r"`prompts=\[\]`"),
        ({"prompts": ["a"], "every_n_steps": 0}, "`every_n_steps=0`"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "`max_new_tokens=0`"),
        ({"prompts": ["a"], "temperature": -1.0}, "`temperature=-1.0`"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleText(**arguments)

"""The few-shot probe in real runs: when it asks, what is left of it, several ranks, and that training is the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
    EventAccumulator,
)

from lightning_mixcn.callbacks import ExpertLoadMonitor, FewShotProbe
from lightning_mixcn.cli import main
from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.model import MoePeftModel
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.studies.benchmarks.few_shot_probe import probe_few_shot
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed
from lightning_mixcn.text import Source, all_documents, load_tokenizer, read_corpus
from tests.callbacks.ranks_run import fit_with_few_shot

Make = Callable[..., Trainer]
SMALL: dict[str, Any] = {"prompts": 6, "shots": 2, "characters": 12}


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    """Four documents in each language, of which every snippet is another."""
    texts = {
        "zh": ["，".join(f"第{number}篇文章的第{place}句话" for place in range(12)) for number in range(4)],
        "en": [" ".join(f"word{place}of{number}" for place in range(30)) for number in range(4)],
    }
    for name, documents in texts.items():
        lines = (json.dumps({"text": text}) for text in documents)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [Source(name, str(tmp_path / f"{name}.jsonl")) for name in texts]


def data() -> FixedBatches:
    return FixedBatches([random_batch([20])] * 10)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "few_shot.jsonl").read_text(encoding="utf-8").splitlines()]


def test_before_during_and_after(tmp_path: Path, sources: list[Source], module: PretrainModule, trainer: Make) -> None:
    callback = FewShotProbe(sources, every_n_steps=2, **SMALL)
    logger = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
    run = trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[callback], logger=logger, log_every_n_steps=1)
    run.fit(module, data())
    found = records(tmp_path)
    assert [line["step"] for line in found] == [0, 2, 3]
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {f"val/few_shot/{source}/{kind}" for source in ("zh", "en") for kind in ("seen", "unseen")}
    assert {tag for tag in seen.Tags()["scalars"] if "few_shot" in tag} == expected
    for tag in expected:
        source, kind = tag.split("/")[2:]
        written = [(line["step"], line["sources"][source][kind]["accuracy"]) for line in found]
        assert [(event.step, event.value) for event in seen.Scalars(tag)] == [
            (step, pytest.approx(value)) for step, value in written
        ]
    assert set(found[0]["sources"]["zh"]["seen"]) == {"accuracy", "low", "high", "chance"}
    assert found[0]["prompts"] == 6


def test_figures_are_those_of_the_trained_model(
    tmp_path: Path, sources: list[Source], module: PretrainModule, trainer: Make
) -> None:
    callback = FewShotProbe(sources, **SMALL)
    trainer(max_steps=2, callbacks=[callback]).fit(module, data())
    assert [line["step"] for line in records(tmp_path)] == [0, 2]
    assert isinstance(module.model, MoePeftModel)
    assert module.model.training
    tokenizer, documents = load_tokenizer(module.tokenizer_path), all_documents(read_corpus(sources[0]))
    assert probe_few_shot(module.model, tokenizer, documents, callback.options, 512) == callback.figures["zh"]


def test_training_does_not_notice(tmp_path: Path, sources: list[Source], tiny_base: Path, trainer: Make) -> None:
    """Neither its weights nor its random numbers nor the counts of tokens by expert."""
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "w1", "w2", "w3"])
    ends, loads = [], []
    for name, callbacks in (("without", []), ("with", [FewShotProbe(sources, every_n_steps=1, **SMALL)])):
        module = PretrainModule(str(tiny_base), dtype="float32", lora=lora)
        folder = tmp_path / name
        trainer(max_steps=3, callbacks=[ExpertLoadMonitor(), *callbacks], default_root_dir=folder).fit(module, data())
        assert module.model is not None
        assert all(child.training for child in module.model.modules())
        ends.append(module.state_dict())
        loads.append((folder / "experts.csv").read_text(encoding="utf-8"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert loads[0] == loads[1]


@pytest.mark.multiprocess
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_answer_together(strategy: str, tmp_path: Path, sources: list[Source], tiny_base: Path) -> None:
    """Five forward passes of three rows or two: one rank has three of them, the other one to keep it company."""
    text = str(sources[0].path)
    (alone,) = run_distributed(fit_with_few_shot, 1, str(tiny_base), str(tmp_path / "one"), text, "auto", 1)
    together, same = run_distributed(fit_with_few_shot, 2, str(tiny_base), str(tmp_path / "two"), text, strategy, 2)
    assert together == same == alone
    assert records(tmp_path / "one") == records(tmp_path / "two")  # rank zero alone writes
    assert [line["step"] for line in records(tmp_path / "two")] == [0, 1, 2]


def test_without_sources_it_takes_the_validation_documents(
    tmp_path: Path, sources: list[Source], tiny_base: Path, module: PretrainModule, trainer: Make
) -> None:
    held_out = PretrainDataModule(
        sources[1:], val_sources=sources[:1], tokenizer=str(tiny_base), sequence_length=24, micro_batch_size=1,
        num_workers=0,
    )  # fmt: skip
    trainer(max_steps=1, callbacks=[FewShotProbe(**SMALL)]).fit(module, held_out)
    assert [list(line["sources"]) for line in records(tmp_path)] == [["zh"], ["zh"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": 0}, "`prompts=0`: expected at least 1; see FewShotProbe"),
        ({"labels": 27}, "`labels=27`: expected at most 26"),
        ({"shots": 0}, "`shots=0`"),
        ({"characters": 3}, "`characters=3`: expected at least 4"),
        ({"every_n_steps": 0}, "`every_n_steps=0`"),
        ({"sources": [{"name": "zh"}]}, r"`sources\[0\]` has no `path`"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShotProbe(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "FewShotProbe has no documents: `sources` is null, and the data module has no validation set. Give `sour"),
        ({"sources": [Source("zh", "none*.jsonl")]}, r"`sources\[0\].path='none\*.jsonl'` matches"),
        ({"labels": 5}, "'zh' has no 5 documents of 5 different snippets of 32 characters"),
    ],
)
def test_what_cannot_work_fails_before_the_model_is_made(
    arguments: dict[str, Any], message: str, sources: list[Source], module: PretrainModule, trainer: Make
) -> None:
    given = {"sources": sources} | arguments if "labels" in arguments else arguments
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer(callbacks=[FewShotProbe(**given)]).fit(module, data())
    assert module.model is None


def test_another_host_is_refused(trainer: Make) -> None:
    class Other(LightningModule):
        pass

    with pytest.raises(ValueError, match="FewShotProbe works with a CausalLMModule, but `model` is Other"):
        FewShotProbe().setup(trainer(), Other(), "fit")


CONFIG = """
model: {class_path: PretrainModule, init_args: {dtype: float32, lora: {r: 2, target_modules: [q_proj, w1, w2, w3]}}}
data:
  class_path: PretrainDataModule
  init_args:
    {sources: [{name: zh, path: zh.jsonl}], sequence_length: 96, micro_batch_size: 2, num_workers: 0, val_fraction: 0}
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 0
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: FewShotProbe
      init_args: {sources: [{name: english, path: en.jsonl}], prompts: 4, shots: 2, characters: 12}
"""


@pytest.mark.usefixtures("sources")
def test_by_its_short_name_in_a_configuration(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    config = yaml.safe_load(CONFIG)
    config["model"]["init_args"]["base"] = str(tiny_base)
    Path("tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    assert [line["step"] for line in records(Path("runs/tiny"))] == [0, 2]

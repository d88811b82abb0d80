"""Long context in real runs: when it is evaluated, what is left of it, and that training does not notice."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
    EventAccumulator,
)

from lightning_mixcn.callbacks import LongContextEval
from lightning_mixcn.callbacks.clocks import StepClock
from lightning_mixcn.callbacks.evaluation.long_context import LongContextReport, perplexity_figure, retrieval_figure
from lightning_mixcn.cli import main
from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.model.inference.prefill import ChunkedPrefill, default_chunk
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed, save_tiny_model
from lightning_mixcn.text import (
    DocumentSet,
    Source,
    all_documents,
    read_corpus,
)
from tests.callbacks.ranks_run import fit_with_documents

Make = Callable[..., Trainer]


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    """One long document and a short one in Chinese, one in English."""
    texts = {"zh": ["今天天气很好。" * 8, "短的。"], "en": ["The weather is fine. " * 5]}
    for name, documents in texts.items():
        lines = (json.dumps({"text": text}) for text in documents)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [Source(name, str(tmp_path / f"{name}.jsonl")) for name in texts]


def data() -> FixedBatches:
    return FixedBatches([random_batch([20])] * 10)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "long_context" / "long_context.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)["evaluations"]
    return found


def events(folder: Path) -> Any:
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def test_before_during_and_after(tmp_path: Path, sources: list[Source], module: PretrainModule, trainer: Make) -> None:
    callback = LongContextEval(
        sources, [32, 64, 128, 256], chunk=50, every_n_steps=2, retrieval=["passkey_en"], retrieval_lengths=[220],
        retrieval_depths=[0, 1], retrieval_prompts=1,
    )  # fmt: skip
    logger = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
    trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[callback], logger=logger, log_every_n_steps=1).fit(
        module, data()
    )

    found = evaluations(tmp_path)
    assert [entry["step"] for entry in found] == [0, 2, 3]
    rows = {(row["source"], row["length"]): row for row in found[-1]["likelihoods"]}
    assert set(rows) == {(name, length) for name in ("zh", "en") for length in (32, 64, 128, 256)}
    # Bytes are tokens, and BOS is one more: 1 + 168 and 1 + 9; 1 + 105.
    assert [rows["zh", length]["tokens"] for length in (32, 64, 128, 256)] == [31 + 9, 63 + 9, 127 + 9, 168 + 9]
    assert [rows["zh", length]["documents_in_full"] for length in (32, 64, 128, 256)] == [1, 1, 1, 0]
    assert rows["en", 256]["bucket_tokens"] == 0
    assert found[-1]["retrieval"] == {"lengths": [220], "depths": [0, 1], "accuracy": {"passkey_en": [[0.0], [0.0]]}}

    seen = events(tmp_path / "tensorboard")
    lengths = {"zh": (32, 64, 128, 256), "en": (32, 64, 128)}
    names = ("nll_nats_per_token", "bits_per_byte", "bucket_nll_nats_per_token")
    expected = {f"long_context/{key}/{name}/{n}" for key, value in lengths.items() for n in value for name in names}
    expected.add("long_context/retrieval/passkey_en/220")
    assert {tag for tag in seen.Tags()["scalars"] if tag.startswith("long_context/")} == expected
    for event, entry in zip(seen.Scalars("long_context/zh/nll_nats_per_token/64"), found, strict=True):
        (row,) = (row for row in entry["likelihoods"] if (row["source"], row["length"]) == ("zh", 64))
        assert event.step == entry["step"]
        assert event.value == pytest.approx(row["nll_nats_per_token"])
    for name in ("perplexity", "retrieval"):
        assert [event.step for event in seen.Images(f"long_context/{name}")] == [0, 2, 3]
        assert (tmp_path / "long_context" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "long_context" / "long_context.csv").open(encoding="utf-8", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0"] * 8 + ["2"] * 8 + ["3"] * 8
    with (tmp_path / "long_context" / "retrieval.csv").open(encoding="utf-8", newline="") as file:
        assert [(row["step"], row["depth"]) for row in csv.DictReader(file)][:3] == [("0", "0"), ("0", "1"), ("2", "0")]


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_other_families(family: str, tmp_path: Path, sources: list[Source], trainer: Make) -> None:
    """In pieces, with keys that are normalised before they are kept, what stock transformers says of the whole."""
    base = save_tiny_model(tmp_path / "base", family, num_experts=16, num_experts_per_tok=4)
    callback = LongContextEval(
        sources, [64, 256], chunk=50, retrieval=["passkey_en"], retrieval_lengths=[220], retrieval_depths=[0],
        retrieval_prompts=1,
    )  # fmt: skip
    module = PretrainModule(str(base), quantization="none", dtype="float32", lora=None)
    trainer(limit_val_batches=1, callbacks=[callback]).validate(module, data(), verbose=False)
    (entry,) = evaluations(tmp_path)
    rows = {(row["source"], row["length"]): row for row in entry["likelihoods"]}
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer("The weather is fine. " * 5).input_ids])  # which puts no BOS there
    stock = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        expected = float(stock(input_ids=ids, labels=ids).loss)
    assert rows["en", 256]["nll_nats_per_token"] == pytest.approx(expected, rel=1e-5)
    assert entry["retrieval"]["accuracy"] == {"passkey_en": [[0.0]]}


def test_at_validation_and_standalone(
    tmp_path: Path, sources: list[Source], module: PretrainModule, trainer: Make
) -> None:
    settings: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer(max_steps=4, callbacks=[LongContextEval(sources, [32])], **settings).fit(module, data())
    assert [entry["step"] for entry in evaluations(tmp_path)] == [2, 4]
    standalone = trainer(limit_val_batches=1, callbacks=[LongContextEval(sources, [64], every_n_steps=1)])
    standalone.validate(PretrainModule(module.base, dtype="float32"), data(), verbose=False)
    assert [(entry["step"], entry["likelihoods"][0]["length"]) for entry in evaluations(tmp_path)] == [
        (0, 64), (2, 32), (4, 32),
    ]  # fmt: skip


@pytest.mark.multiprocess
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_evaluate_together(strategy: str, tmp_path: Path, sources: list[Source], tiny_base: Path) -> None:
    """Of three documents one rank has two; every length is of all tokens of both."""
    text = Path(str(sources[0].path))
    text.write_text(text.read_text(encoding="utf-8") + '\n{"text": "第三篇文章，不太长，也不太短。"}', encoding="utf-8")
    (alone,) = run_distributed(fit_with_documents, 1, str(tiny_base), str(tmp_path / "one"), str(text), "auto", 1)
    together, same = run_distributed(
        fit_with_documents, 2, str(tiny_base), str(tmp_path / "two"), str(text), strategy, 2
    )
    assert together == same
    assert [entry["step"] for entry in together] == [0, 1, 2]
    for ours, expected in zip(together, alone, strict=True):
        assert ours["retrieval"] == expected["retrieval"]
        for row, other in zip(ours["likelihoods"], expected["likelihoods"], strict=True):
            assert row["documents"] == 3
            for name, value in row.items():
                assert value == (pytest.approx(other[name], rel=1e-5) if isinstance(value, float) else other[name])


def test_training_does_not_notice(
    tmp_path: Path, sources: list[Source], tiny_base: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its weights nor its random numbers nor its clock; each reading of the clock is a second."""
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "w1", "w2", "w3"])
    ends, speeds, advance = [], [], ChunkedPrefill.advance
    for callbacks in ([], [LongContextEval(sources, [32], every_n_steps=1)]):
        module = PretrainModule(str(tiny_base), dtype="float32", lora=lora)
        seconds = [0]

        def now(seconds: list[int] = seconds) -> float:
            seconds[0] += 1
            return seconds[0]

        def slow(self: ChunkedPrefill, *args: Any, seconds: list[int] = seconds) -> Any:
            seconds[0] += 1000
            return advance(self, *args)

        monkeypatch.setattr(ChunkedPrefill, "advance", slow)
        monkeypatch.setattr("lightning_mixcn.callbacks.clocks.perf_counter", now)
        run = trainer(max_steps=3, callbacks=[StepClock(), *callbacks])
        run.fit(module, data())
        assert module.model is not None
        assert all(child.training for child in module.model.modules())
        ends.append(module.state_dict())
        speeds.append(float(run.callback_metrics["throughput/tokens_per_second"]))
    assert seconds[0] > 1000
    assert speeds[0] == speeds[1]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_length_that_does_not_fit_is_told(
    tmp_path: Path, sources: list[Source], module: PretrainModule, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = ChunkedPrefill.__init__

    def small(self: ChunkedPrefill, model: Any, max_tokens: int) -> None:
        if max_tokens > 100:
            raise torch.OutOfMemoryError
        make(self, model, max_tokens)

    monkeypatch.setattr(ChunkedPrefill, "__init__", small)
    run = trainer(max_steps=1, callbacks=[LongContextEval(sources, [64, 128], every_n_steps=5)])
    with pytest.warns(UserWarning, match=r"step [01]: lengths \[128\] do not fit into memory .* Lower `chunk`"):
        run.fit(module, data())
    assert [entry["out_of_memory"] for entry in evaluations(tmp_path)] == [[128], [128]]


class WithDocuments(FixedBatches):
    """Has the validation documents that `LongContextEval` asks a data module for."""

    def __init__(self, sources: list[Source]) -> None:
        super().__init__([random_batch([20])] * 10)
        self.given = sources

    def evaluation_documents(self, stage: str) -> list[DocumentSet]:
        assert stage == "val"
        return [all_documents(read_corpus(source)) for source in self.given]


def test_without_sources_it_takes_the_validation_documents(
    tmp_path: Path, sources: list[Source], module: PretrainModule, trainer: Make
) -> None:
    run = trainer(max_steps=1, callbacks=[LongContextEval(lengths=[32], documents=1, every_n_steps=1)])
    run.fit(module, WithDocuments(sources))
    rows = evaluations(tmp_path)[0]["likelihoods"]
    assert [(row["source"], row["documents"]) for row in rows] == [("zh", 1), ("en", 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [512, 512]}, r"`lengths=\[512, 512\]`: expected different numbers of tokens"),
        ({"retrieval_lengths": [1]}, r"`retrieval_lengths\[0\]=1`: expected at least 2"),
        ({"documents": 0}, "`documents=0`: expected at least 1"),
        ({"chunk": 0}, "`chunk=0`"),
        ({"every_n_steps": 0}, "`every_n_steps=0`"),
        ({"retrieval_prompts": 0}, "`retrieval_prompts=0`"),
        ({"retrieval": ["passkey"]}, r"`retrieval\[0\]='passkey'`: expected one of passkey_zh, passkey_en, needle_zh"),
        (
            {"retrieval_depths": [1.5]},
            r"`retrieval_depths\[0\]=1.5`: expected at most 1 \(0 is the beginning",
        ),
        ({"sources": [{"name": "zh"}]}, r"`sources\[0\]` has no `path`"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongContextEval(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "LongContextEval has no documents: `sources` is null, and the data module .* Give `sources`, e.g."),
        ({"sources": [Source("zh", "none*.jsonl")]}, r"`sources\[0\].path='none\*.jsonl'` matches"),
        ({"retrieval": ["passkey_zh"], "retrieval_lengths": [40]}, "of 40 tokens has no room for 'passkey_zh'. Give"),
    ],
)
def test_what_cannot_work_fails_in_setup(
    arguments: dict[str, Any], message: str, sources: list[Source], module: PretrainModule, trainer: Make
) -> None:
    given = arguments if "retrieval" not in arguments else arguments | {"sources": sources}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer(callbacks=[LongContextEval(**given)]).fit(module, data())


def test_another_host_is_refused(trainer: Make) -> None:
    class Other(LightningModule):
        pass

    with pytest.raises(ValueError, match="LongContextEval works with a CausalLMModule, but `model` is Other"):
        LongContextEval().setup(trainer(), Other(), "fit")


CONFIG = """
model: {class_path: PretrainModule, init_args: {dtype: float32, lora: {r: 2, target_modules: [q_proj, w1, w2, w3]}}}
data:
  class_path: PretrainDataModule
  init_args:
    {sources: [{name: zh, path: zh.jsonl}], sequence_length: 24, micro_batch_size: 1, num_workers: 0, val_fraction: 0}
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: LongContextEval
      init_args: {sources: [{name: long, path: en.jsonl}], lengths: [32, 64], every_n_steps: 2}
"""


@pytest.mark.usefixtures("sources")
def test_by_its_short_name_in_a_configuration(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    config = yaml.safe_load(CONFIG)
    config["model"]["init_args"]["base"] = str(tiny_base)
    Path("tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    assert [entry["step"] for entry in evaluations(Path("runs/tiny"))] == [0, 2]
    seen = events(Path("runs/tiny/tensorboard"))
    assert [event.step for event in seen.Scalars("long_context/long/bits_per_byte/64")] == [0, 2]


def test_the_data_module_of_this_package_has_documents(sources: list[Source], tiny_base: Path) -> None:
    held_out = PretrainDataModule(sources[1:], val_sources=sources[:1], tokenizer=str(tiny_base))
    held_out.setup("validate")
    assert [(part.name, len(part)) for part in held_out.evaluation_documents("val")] == [("zh", 2)]


LENGTHS = (512, 1024, 2048, 4096)


def evaluation(step: int) -> Any:
    """Perplexity 20 − step at 512 tokens, and one less at each length; English reaches 1024 tokens only."""
    rows = [
        {
            "source": source,
            "length": length,
            "perplexity": 20.0 - step - index,
            "bucket_tokens": 0 if source == "en" and length > 1024 else 99,
        }
        for source in ("zh", "en")
        for index, length in enumerate(LENGTHS)
    ]
    accuracy = {"passkey_zh": [[1.0, 0.5], [0.0, 0.25]], "needle_en": [[1.0, 1.0], [1.0, 0.0]]}
    retrieval = {"lengths": [512, 4096], "depths": [0.0, 1.0], "accuracy": accuracy}
    return {"step": step, "likelihoods": rows, "retrieval": retrieval, "out_of_memory": []}


def test_a_resumed_run_goes_on_and_a_new_one_starts_from_scratch(tmp_path: Path) -> None:
    for step in (0, 2, 4, 4):
        LongContextReport(tmp_path).add(evaluation(step))
    steps = [[entry["step"] for entry in LongContextReport(tmp_path, after).evaluations] for after in (None, 2, -1)]
    assert steps == [[0, 2, 4], [0, 2], []]


def test_the_files(tmp_path: Path) -> None:
    figures = LongContextReport(tmp_path).add(evaluation(3))
    assert set(figures) == {"perplexity", "retrieval"}
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"long_context.json", "long_context.csv", "perplexity.png", "retrieval.csv", "retrieval.png"}
    assert json.loads((tmp_path / "long_context.json").read_text(encoding="utf-8"))["evaluations"] == [evaluation(3)]
    lines = (tmp_path / "retrieval.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "step,task,depth,length,accuracy"
    assert lines[1:4] == ["3,passkey_zh,0.0,512,1.0", "3,passkey_zh,0.0,4096,0.5", "3,passkey_zh,1.0,512,0.0"]


def test_nothing_that_fits_is_a_file_without_pictures(tmp_path: Path) -> None:
    nothing: Any = {"step": 0, "likelihoods": [], "retrieval": None, "out_of_memory": [512]}
    assert LongContextReport(tmp_path).add(nothing) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["long_context.json"]


def test_curves_of_earlier_steps_lie_under_the_last_one() -> None:
    figure = perplexity_figure([evaluation(0), evaluation(5)])
    assert figure.get_suptitle() == "perplexity by context length, step 5 (red) and before"
    assert perplexity_figure([evaluation(5)]).get_suptitle() == "perplexity by context length, step 5"
    chinese, english = figure.axes
    assert (chinese.get_title(), english.get_title()) == ("zh", "en")
    curves = {line.get_label(): line for line in chinese.lines}
    assert list(curves["step 5"].get_xdata()) == list(LENGTHS)
    assert list(curves["step 5"].get_ydata()) == [15.0, 14.0, 13.0, 12.0]
    assert curves["step 5"].get_color() == "tab:red"
    assert curves["step 5"].get_zorder() > curves["step 0"].get_zorder()
    assert [len(line.get_xdata()) for line in english.lines] == [2, 2]
    assert chinese.get_xscale() == "log"


def test_heatmaps_have_depths_down_and_lengths_across() -> None:
    figure = retrieval_figure(evaluation(5)["retrieval"], 5)
    passkey, needle, colours = figure.axes
    assert figure.get_suptitle() == "retrieval of a planted fact, step 5"
    assert (passkey.get_ylabel(), colours.get_ylabel()) == ("depth of the fact", "share answered right")
    assert (passkey.get_title(), needle.get_title()) == ("passkey_zh", "needle_en")
    assert passkey.images[0].get_array().tolist() == [[1.0, 0.5], [0.0, 0.25]]
    assert [label.get_text() for label in passkey.get_xticklabels()] == ["512", "4096"]
    assert [label.get_text() for label in passkey.get_yticklabels()] == ["0", "1"]


def test_a_gpu_gets_longer_chunks() -> None:
    """It decodes all weights for each of them."""
    assert [default_chunk(torch.device(device)) for device in ("cpu", "cuda")] == [512, 4096]
    assert LongContextEval().chunk is None

"""Batches of somebody else's: checked once, completed where they leave something out, refused in one line."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorWithFlattening

from lightning_mixcn import trainer_defaults
from lightning_mixcn.callbacks import ExpertLoadMonitor
from lightning_mixcn.model.batch import check_batch, complete_batch
from lightning_mixcn.modules import InstructModule, PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

Make = Callable[..., Any]
Batch = dict[str, Tensor]
TEXTS = ["今天天气很好。", "Hello", "good morning", "好"] * 3


class OwnData(LightningDataModule):
    """What a newcomer writes: transformers' tokenizer and collator, and nothing of this package's."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.tokenizer.pad_token = self.tokenizer.eos_token

    def train_dataloader(self) -> DataLoader[Any]:
        rows: Any = [self.tokenizer(text) for text in TEXTS]
        return DataLoader(rows, batch_size=4, collate_fn=DataCollatorForLanguageModeling(self.tokenizer, mlm=False))

    val_dataloader = train_dataloader


def loader(*batches: Batch) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a tuple is a dataset, too


def only(batch: Batch, *names: str) -> Batch:
    return {name: batch[name] for name in names}


def check(batch: Any, *, required: Sequence[str] = ("input_ids", "labels"), sources: int = 1) -> None:
    check_batch(
        batch, what="The first train batch", required=required, pieces=272, sources=sources, device=torch.device("cpu")
    )


def test_a_collator_of_transformers_is_enough(tiny_base: Path, lora: Make, tmp_path: Path) -> None:
    given = trainer_defaults(tmp_path / "run", [ExpertLoadMonitor(every_n_steps=1)])
    trainer = Trainer(**given | {"log_every_n_steps": 1}, accelerator="cpu", max_steps=3, val_check_interval=3)
    trainer.fit(PretrainModule(str(tiny_base), dtype="float32", lora=lora()), OwnData(tiny_base))
    logged = trainer.logged_metrics
    assert trainer.global_step == 3
    assert float(logged["val/all/nll_nats_per_token"]) > 0
    assert "val/all/bits_per_byte" not in logged  # nobody has said how many bytes a label is
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("given", [("input_ids", "labels"), ("input_ids", "labels", "source_ids", "document_ids")])
def test_what_is_left_out_changes_nothing(given: tuple[str, ...], tiny_base: Path, lora: Make, trainer: Make) -> None:
    """Rows of one document each, without padding, train to the same bits."""
    whole, ends = random_batch([24, 24], seed=3), []
    for batch in (whole, only(whole, *given)):
        module = InstructModule(str(tiny_base), "conversation", dtype="float32", lora=lora())
        trainer().fit(module, loader(batch, batch), loader(batch))
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_attention_mask_says_what_is_padding() -> None:
    for lengths in ([20, 9], [24, 1]):
        whole = random_batch(lengths)
        batch = only(whole, "input_ids", "labels") | {"attention_mask": (whole["document_ids"] >= 0).long()}
        complete_batch(batch, is_scored=True)
        for name in ("document_ids", "source_ids"):
            assert torch.equal(batch[name], whole[name])
            assert batch[name].dtype == whole[name].dtype
        inside = whole["document_ids"] >= 0
        assert torch.equal(batch["position_ids"][inside], whole["position_ids"][inside])
        assert not batch["label_bytes"].any()


def test_padding_on_the_left_is_a_document_of_its_own() -> None:
    ids = torch.arange(3, 9)[None]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    complete_batch(batch, is_scored=False)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3]]
    assert batch["document_ids"].tolist() == [[-1, -1, 0, 0, 0, 0]]
    assert "text_mask" not in batch


def test_positions_of_a_collator_that_packs_are_documents() -> None:
    rows = [{"input_ids": list(range(3, 3 + length))} for length in (4, 2, 3)]
    batch = DataCollatorWithFlattening(return_tensors="pt")(rows)
    check(batch)
    complete_batch(batch, is_scored=False)
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 2, 2, 2]]


def test_one_source_a_row_becomes_one_a_position() -> None:
    batch = random_batch([20, 9]) | {"source_ids": torch.tensor([1, 0])}
    complete_batch(batch, is_scored=False)
    assert batch["source_ids"][0, [0, 19, 20]].tolist() == [1, 1, -1]
    assert batch["source_ids"][1, [0, 8, 9]].tolist() == [0, 0, -1]


GOOD = random_batch([20, 9])
WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([GOOD["input_ids"]], "is a list, expected a dict with the tensors input_ids and labels. Give the"),
    "no labels": (only(GOOD, "input_ids"), "`labels` is missing, expected int64 .B, S., .*it holds input_ids. Add"),
    "nothing": ({}, "`input_ids` is missing, .* it holds nothing"),
    "type": (GOOD | {"labels": GOOD["labels"].int()}, "`labels` is int32, expected int64 .B, S., .*Convert it"),
    "a float": (GOOD | {"input_ids": GOOD["input_ids"].float()}, "`input_ids` is float32, expected int64"),
    "no tensor": (GOOD | {"labels": [[1]]}, "`labels` is a list, expected int64"),
    "one row": ({name: value[0] for name, value in GOOD.items()}, r"`input_ids` has the shape \[24\], expected .*Pad"),
    "shape": (GOOD | {"labels": GOOD["labels"][:, 1:]}, r"`labels` has the shape \[2, 23\] where .* \[2, 24\]"),
    "scalar": (GOOD | {"source_ids": torch.tensor(0)}, r"`source_ids` has the shape \[\]"),
    "device": (GOOD | {"labels": GOOD["labels"].to("meta")}, "`labels` is on meta, expected cpu. Leave `transfer_"),
    "too large": (GOOD | {"input_ids": GOOD["input_ids"] + 200}, r"`input_ids` holds \d+, expected 0 to 271. Take"),
    "negative": (GOOD | {"input_ids": GOOD["input_ids"] - 9}, "`input_ids` holds -8, expected 0 to 271. See docs"),
    "padding": (GOOD | {"labels": GOOD["labels"].clamp_min(-1)}, "`labels` holds -1, expected 0 to 271 or -100"),
    "source": (GOOD | {"source_ids": GOOD["source_ids"] + 1}, "`source_ids` holds 1, expected -1 to 0. Name every"),
    "documents": (GOOD | {"document_ids": GOOD["document_ids"] - 5}, "`document_ids` holds -5, expected -1 or more"),
    "packed mask": (GOOD | {"attention_mask": GOOD["document_ids"] + 3}, "`attention_mask` holds 3, expected 0 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_batch_is_one_line(name: str) -> None:
    batch, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^The first train batch.*{message}") as error:
        check(batch)
    assert "\n" not in str(error.value)


def test_several_sources_have_to_be_told_apart() -> None:
    check(GOOD, sources=2)
    with pytest.raises(ValueError, match="`text_mask` is missing"):
        check(only(GOOD, "input_ids", "labels"), required=["text_mask"])


@pytest.mark.parametrize(("method", "stage"), [("validate", "val"), ("test", "test"), ("predict", "predict")])
def test_every_loader_is_checked(method: str, stage: str, tiny_base: Path, trainer: Make) -> None:
    bad = only(GOOD, "input_ids")
    run = trainer(limit_val_batches=None)
    with pytest.raises(ValueError, match=f"The first {stage} batch: `labels` is missing"):
        getattr(run, method)(PretrainModule(str(tiny_base)), loader(bad))


def test_prediction_needs_the_numbers_of_documents(tiny_base: Path, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base))
    batches = [only(GOOD, "input_ids", "labels")]
    with pytest.raises(ValueError, match="The first predict batch of FixedBatches: `document_index` is missing"):
        trainer().predict(module, FixedBatches(batches))
    with pytest.raises(ValueError, match="`source_ids` is missing"):
        trainer().predict(module, FixedBatches(batches, ["zh", "en"]))


def test_tuples_of_tensors_are_refused(tiny_base: Path, lora: Make, trainer: Make) -> None:
    rows = TensorDataset(GOOD["input_ids"], GOOD["labels"])
    with pytest.raises(ValueError, match="The first train batch is a list, expected a dict"):
        trainer().fit(PretrainModule(str(tiny_base), lora=lora()), DataLoader(rows, batch_size=2), loader(GOOD))


def test_only_the_first_batch_costs(
    tiny_base: Path, lora: Make, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watch(_: Any, *, what: str, **given: Any) -> None:
        seen.append(what)

    monkeypatch.setattr("lightning_mixcn.modules.checks.check_batch", watch)
    run = trainer(max_steps=4, limit_val_batches=None, val_check_interval=2)
    run.fit(PretrainModule(str(tiny_base), dtype="float32", lora=lora()), FixedBatches([GOOD] * 4))
    assert sorted(seen) == ["The first train batch of FixedBatches", "The first val batch of FixedBatches"]

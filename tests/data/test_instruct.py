"""Batches of conversations, through the data module and real runs of Lightning."""

import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_mixcn.data import InstructDataModule
from lightning_mixcn.text import ConversationSource

Make = Callable[..., InstructDataModule]
BOS, EOS, FIRST_BYTE = 1, 2, 3


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [
        {"instruction": f"问{number}", "output": "答" * (1 + number % 4), "history": [["早", "好"]] * (number % 3)}
        for number in range(120)
    ]


@pytest.fixture
def make(records: list[dict[str, Any]], tokenizer_folder: str, tmp_path: Path) -> Make:
    (tmp_path / "zh.json").write_text(json.dumps(records))
    (tmp_path / "en.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    )

    def module(**changes: Any) -> InstructDataModule:
        settings: dict[str, Any] = {
            "sources": [ConversationSource("zh", str(tmp_path / "zh.json"))],
            "tokenizer": tokenizer_folder,
            "sequence_length": 160,
            "micro_batch_size": 2,
            "num_streams": 2,
            "num_workers": 0,
            "val_fraction": 0.1,
        }
        return InstructDataModule(**(settings | changes))

    return module


def first(data: InstructDataModule, count: int) -> list[dict[str, Tensor]]:
    data.setup("fit")
    return list(islice(data.train_dataloader(), count))


def text(ids: Tensor) -> str:
    return bytes(index - FIRST_BYTE for index in ids.tolist() if index >= FIRST_BYTE).decode()


@pytest.mark.parametrize("packing", ["best_fit", "documents"])
def test_conversations_stay_whole_and_only_answers_have_labels(make: Make, packing: str) -> None:
    documents = 0
    for batch in first(make(packing=packing), 20):
        for row in range(2):
            for document in range(int(batch["document_ids"][row].max()) + 1):
                inside = batch["document_ids"][row] == document
                ids, labels = batch["input_ids"][row][inside], batch["labels"][row][inside]
                assert ids[[0, -1]].tolist() == [BOS, EOS]
                assert batch["position_ids"][row][inside].tolist() == list(range(len(ids)))
                learned = labels >= 0
                assert torch.equal(ids[learned], labels[learned])
                answers = [turn.split("[/INST]")[1] for turn in text(ids).split("[INST]")[1:]]
                assert text(ids[learned]) == "".join(answers)
                assert int((labels == EOS).sum()) == len(answers)
                documents += 1
    assert documents > 40


def test_held_out_answers_are_scored(make: Make, records: list[dict[str, Any]]) -> None:
    data = make(max_eval_rows=None)
    data.setup("fit")
    loader: Any = data.val_dataloader()
    batches = list(loader)
    held_out = data.evaluation_conversations("val")[0]
    assert 5 < len(held_out) < 25
    answers = "".join(turn.content for turns in held_out for turn in turns if turn.role == "assistant")
    assert sum(int(batch["label_bytes"].sum()) for batch in batches) == len(answers.encode())
    assert all(torch.equal(batch["text_mask"], (batch["labels"] > EOS)) for batch in batches)


def test_two_sources_are_mixed(make: Make, tmp_path: Path) -> None:
    sources = [
        ConversationSource("zh", str(tmp_path / "zh.json"), weight=3),
        ConversationSource("en", str(tmp_path / "en.jsonl"), weight=1),
    ]
    batches = first(
        make(sources=sources, val_fraction=0), 600
    )  # what waits to fit into a row is 64 conversations a stream
    ids = torch.cat([batch["source_ids"].flatten() for batch in batches])
    assert float((ids == 1).sum() / (ids >= 0).sum()) == pytest.approx(0.25, abs=0.02)


def test_what_is_too_long_is_counted(make: Make) -> None:
    data = make(sequence_length=50)
    first(data, 40)
    dropped, shortened = data.too_long()["zh"]
    assert dropped == 0
    assert shortened > 10
    data = make(sequence_length=30)
    first(data, 40)
    assert data.too_long()["zh"][0] > 10


def test_nothing_fits(make: Make) -> None:
    with pytest.raises(ValueError, match=r"documents of source 'zh', one after the other, were longer than a row"):
        first(make(sequence_length=8), 1)


class Recorder(LightningModule):
    """Trains one number and keeps its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.rows: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.rows.append(batch["labels"])
        return self.weight**2

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning", "ignore:This process .* is multi-threaded"
)
def test_a_resumed_run_goes_on_with_the_next_row(make: Make, tmp_path: Path, workers: int) -> None:
    def run(steps: int, **settings: Any) -> tuple[list[Tensor], Trainer]:
        module = Recorder()
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, datamodule=make(num_workers=workers), **settings)
        return module.rows, trainer

    whole, _ = run(9)
    begun, trainer = run(4)
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    rest, _ = run(9, ckpt_path=str(tmp_path / "at4.ckpt"), weights_only=True)
    assert torch.equal(torch.cat([*begun, *rest]), torch.cat(whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": "first"}, r"`answers='first'`: expected one of all, last"),
        ({"on_too_long": "keep"}, r"`on_too_long='keep'`: expected one of cut_at_turn, truncate, drop"),
        ({"packing": "concatenate"}, r"`packing='concatenate'`: expected one of best_fit, documents"),
        ({"sources": [{"name": "zh", "path": "x", "text_key": "t"}]}, r"has the unknown key 'text_key'"),
        ({"sources": [{"name": "zh", "path": "x", "records": "t"}]}, r"records='t'`: expected null or one of alpaca"),
    ],
)
def test_bad_arguments(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_template_that_is_not_there(make: Make) -> None:
    with pytest.raises(FileNotFoundError, match=r"`template='nowhere\.jinja'` is not there"):
        first(make(template="nowhere.jinja"), 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "问", "completion": "答"}, "its keys are 'prompt', 'completion'"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": [{"role": "user", "content": "问"}] * 2}, "turns 0 and 1 are both the user's"),
        ({"conversations": [{"from": "gpt", "value": "答"}]}, "the assistant speaks first"),
    ],
)
def test_a_bad_record_is_named_with_its_place(
    make: Make, tmp_path: Path, records: list[dict[str, Any]], record: dict[str, Any], message: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in [*records[:2], record]), encoding="utf-8")
    data = make(sources=[ConversationSource("bad", str(file))], val_fraction=0.0)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        first(data, 1)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


STRICT = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}
{%- elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""


@pytest.fixture
def strict(make: Make, records: list[dict[str, Any]], tmp_path: Path) -> Make:
    """Write a template without a system turn, and 120 conversations of which lines 17 and 90 have one."""
    (tmp_path / "strict.jinja").write_text(STRICT)
    for line in (17, 90):
        records = [*records[: line - 1], {**records[line - 1], "system": "S"}, *records[line:]]
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps(record) for record in records))

    def module(**changes: Any) -> InstructDataModule:
        settings: dict[str, Any] = {"template": str(tmp_path / "strict.jinja"), "val_fraction": 0.0}
        return make(sources=[ConversationSource("zh", str(tmp_path / "s.jsonl"))], **(settings | changes))

    return module


REFUSED = r"s\.jsonl` line 17: .*strict\.jinja` cannot be used for this conversation: no system here"


def test_what_the_template_refuses_is_named_before_training(strict: Make) -> None:
    with pytest.raises(ValueError, match=rf"{REFUSED}\. Mend the record, or leave such .* `on_bad_record: skip`$"):
        strict().setup("fit")


def test_what_the_template_refuses_is_skipped_and_counted(strict: Make, caplog: pytest.LogCaptureFixture) -> None:
    data = strict(on_bad_record="skip", num_streams=1)
    batches = first(data, 12)
    assert "S\n\n" not in "".join(text(batch["input_ids"].flatten()) for batch in batches)
    while data.refused()["zh"] < 2:
        next(data.train_dataloader().__iter__())
    named = [record.getMessage() for record in caplog.records if "It is left out" in record.getMessage()]
    assert len(named) == 2
    assert {int(re.findall(r"s\.jsonl` line (\d+): ", message)[0]) for message in named} == {17, 90}
    assert data.too_long() == {"zh": (0, 0)}
    assert data.bad_records() == 0


def test_what_is_refused_only_when_it_is_met_is_named_too(strict: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mixcn.data.module._TRIED_DOCUMENTS", 1)
    data = strict(num_streams=1)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"s\.jsonl` line (17|90): .*no system here"):
        list(islice(data.train_dataloader(), 200))


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_what_the_template_refuses_of_an_evaluation_set(
    strict: Make, tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [ConversationSource("zh", str(tmp_path / "s.jsonl"))]
    data = strict(test_sources=sources, on_bad_record=policy, max_eval_rows=None)
    data.setup("test")
    if policy == "error":
        with pytest.raises(ValueError, match=REFUSED):
            data.test_dataloader()
        return
    loader: Any = data.test_dataloader()
    documents = {int(index) for batch in loader for index in batch["document_index"].flatten()} - {-1}
    assert documents == set(range(120)) - {16, 89}
    assert sum("It is left out" in record.getMessage() for record in caplog.records) == 2


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_template_that_refuses_everything(strict: Make, tmp_path: Path, policy: str) -> None:
    refuses = "{% if messages[0].content[0] in '问早S' %}{{ raise_exception('no') }}{% endif %}"
    (tmp_path / "strict.jinja").write_text(refuses + STRICT, encoding="utf-8")
    message = "line 1: " if policy == "error" else r"refuses each of the 120 conversations of source 'zh'.* line 1: "
    with pytest.raises(ValueError, match=message):
        strict(on_bad_record=policy).setup("fit")

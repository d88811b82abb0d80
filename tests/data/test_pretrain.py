from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.data import module as data_module
from lightning_mixcn.text import Source

Arguments = Callable[..., dict[str, Any]]


@pytest.fixture
def module(arguments: Arguments) -> PretrainDataModule:
    return PretrainDataModule(**arguments())


def on_rank(module: PretrainDataModule, ranks: int, rank: int) -> PretrainDataModule:
    """Let the module see what Lightning's trainer shows under a strategy of several ranks."""
    shares = {"num_replicas": ranks, "rank": rank}
    flags = {"overfit_batches": 0.0, "limit_train_batches": 1.0, "val_check_interval": 1.0, "callbacks": []}
    trainer: Any = SimpleNamespace(
        distributed_sampler_kwargs=shares, state=SimpleNamespace(fn=None, status=None), **flags
    )
    module.trainer = trainer
    return module


def input_ids(module: PretrainDataModule, count: int) -> list[torch.Tensor]:
    try:
        return [batch["input_ids"] for batch in islice(module.train_dataloader(), count)]
    finally:
        module.teardown("fit")


def test_training_batch(module: PretrainDataModule) -> None:
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == {
        "input_ids": ((2, 32), torch.int64),
        "labels": ((2, 32), torch.int64),
        "document_ids": ((2, 32), torch.int32),
        "position_ids": ((2, 32), torch.int64),
        "source_ids": ((2, 32), torch.int16),
        "continuation_mask": ((2, 32), torch.bool),
    }
    assert module.tokenizer.vocab_size == 259


def test_source_names_and_description(arguments: Arguments, sources: list[Source]) -> None:
    module = PretrainDataModule(**arguments(val_sources=sources[1:], predict_sources=sources[:1]))
    assert [module.source_names(stage) for stage in ("train", "val", "test", "predict")] == [
        ["zh", "en"],
        ["en"],
        ["zh", "en"],
        ["zh"],
    ]
    module.setup("fit")
    module.setup("predict")
    counts = {name: count for name, count in module.describe().items() if name.endswith("documents")}
    assert counts == {
        "train/zh/documents": 200,
        "train/en/documents": 100,
        "val/en/documents": 100,
        "predict/zh/documents": 200,
    }


def test_held_out_sets_do_not_depend_on_the_seed(arguments: Arguments) -> None:
    batches = []
    for seed in (0, 1):
        module = PretrainDataModule(**arguments(seed=seed))
        module.setup("validate")
        loader = module.val_dataloader()
        batches.append(next(iter(loader))["input_ids"])
    assert torch.equal(*batches)


def test_no_validation(arguments: Arguments) -> None:
    module = PretrainDataModule(**arguments(val_fraction=0.0))
    module.setup("fit")
    assert module.val_dataloader() == []
    with pytest.raises(ValueError, match="There is no val set"):
        module.setup("validate")


def test_prediction_can_be_joined_with_its_documents(arguments: Arguments, sources: list[Source]) -> None:
    module = PretrainDataModule(**arguments(sources=[], predict_sources=sources, max_eval_rows=1))
    module.setup("predict")
    sizes = np.zeros(300, dtype=np.int64)
    for batch in module.predict_dataloader():
        scored = batch["label_bytes"] > 0
        np.add.at(sizes, batch["document_index"][scored].numpy(), batch["label_bytes"][scored].numpy())
    assert (sizes > 0).all()  # every document, whatever the cap for validation
    origin = module.document_source(250)
    assert (origin.source, str(origin.file), origin.record) == ("en", sources[1].path, 51)


def test_the_cap_holds_for_validation(arguments: Arguments) -> None:
    module = PretrainDataModule(**arguments(max_eval_rows=2))
    module.setup("validate")
    assert sum(len(batch["labels"]) for batch in module.val_dataloader()) == 4


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 8), (2, 4), (4, 2), (3, 1)])
def test_resume_on_other_ranks(
    ranks: int, micro_batch_size: int, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kills, each resumed on other ranks; the second state is saved by the resumed run."""
    whole = PretrainDataModule(**arguments(micro_batch_size=1))
    whole.setup("fit")
    expected = torch.cat(input_ids(whole, 24 + 2 * ranks * micro_batch_size + 10))
    first = PretrainDataModule(**arguments(micro_batch_size=3))
    first.setup("fit")
    found = torch.cat(input_ids(first, 8))
    state = first.state_dict()
    assert state["rows"] == 24
    steps, of_ranks = [], list[Any]()

    def gather(mine: Any) -> list[Any]:  # the last rank has what all of them have
        of_ranks.append(mine)
        return of_ranks

    monkeypatch.setattr(data_module, "_of_all_ranks", gather)
    for rank in range(ranks):
        module = on_rank(PretrainDataModule(**arguments(micro_batch_size=micro_batch_size)), ranks, rank)
        module.setup("fit")
        module.load_state_dict(state)
        steps.append(input_ids(module, 2))
        last_state = module.state_dict()
        assert last_state["rows"] == 24 + 2 * ranks * micro_batch_size
    monkeypatch.undo()
    found = torch.cat([found, *(part for step in zip(*steps, strict=True) for part in step)])
    again = PretrainDataModule(**arguments(micro_batch_size=5))
    again.load_state_dict(last_state)  # before setup: Lightning's order is not ours to choose
    again.setup("fit")
    found = torch.cat([found, *input_ids(again, 2)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"`seed` was 0 and is 1"),
        ({"num_streams": 4}, r"`num_streams` was 8 and is 4"),
        ({"sequence_length": 64}, r"`sequence_length` was 32 and is 64"),
        ({"val_fraction": 0.2}, r"`training texts of source zh` was '\w+' and is '\w+'"),
    ],
)
def test_another_run_s_state_is_refused(changes: dict[str, Any], message: str, arguments: Arguments) -> None:
    module = PretrainDataModule(**arguments())
    module.setup("fit")
    other = PretrainDataModule(**arguments(**changes))
    other.setup("fit")
    with pytest.raises(ValueError, match=rf"sequence of training rows cannot be continued: .*{message}"):
        other.load_state_dict(module.state_dict())


def test_weights_and_names_belong_to_the_state(arguments: Arguments, sources: list[Source]) -> None:
    module = PretrainDataModule(**arguments())
    module.setup("fit")
    other = PretrainDataModule(**arguments(sources=[replace(sources[0], weight=0.8), replace(sources[1], name="uk")]))
    other.setup("fit")
    message = r"`sources` was 'zh, en' and is 'zh, uk'; `weight of source zh` was 0.9 and is 0.8; .*of source en"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(module.state_dict())


def test_evaluation_alone_takes_any_state(arguments: Arguments, sources: list[Source]) -> None:
    module = PretrainDataModule(**arguments())
    module.setup("fit")
    other = PretrainDataModule(**arguments(sources=[], val_sources=sources[1:]))
    other.setup("validate")
    other.load_state_dict(module.state_dict())
    assert len(other.val_dataloader()) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 0}, r"`sequence_length=0`: expected at least 2"),
        ({"sequence_length": 1}, r"`sequence_length=1`: expected at least 2"),
        ({"micro_batch_size": 0}, r"`micro_batch_size=0`: expected at least 1"),
        ({"num_streams": 0}, r"`num_streams=0`: expected at least 1"),
        ({"num_workers": -1}, r"`num_workers=-1`: expected at least 0"),
        ({"max_eval_rows": 0}, r"`max_eval_rows=0`: expected at least 1"),
        ({"packing": "best"}, r"`packing='best'`: expected one of documents"),
        ({"weight_unit": "words"}, r"`weight_unit='words'`: expected one of tokens, bytes"),
        ({"val_fraction": 1.0}, r"`val_fraction=1.0`: expected less than 1"),
        ({"sources": [{"name": "zh", "path": "x", "weight": 0}]}, r"`sources\[0\].weight=0`: expected more than 0"),
        ({"sources": [Source("zh", "x"), Source("zh", "y")]}, r"`sources\[1\].name='zh'` is already the name"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str, arguments: Arguments) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainDataModule(**arguments(**changes))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("fit", {"tokenizer": None}, r"`tokenizer` is null. Give the folder"),
        ("fit", {"sources": []}, r"`sources` is empty. Give at least one"),
        ("test", {}, r"There is no test set: `test_sources` is empty and `test_fraction` is 0"),
        ("predict", {}, r"`predict_sources` is empty"),
        ("fit", {"val_fraction": 1e-9}, r"`val_fraction=1e-09` holds out no document of source 'zh' \(200 in all\)"),
    ],
)
def test_setup_errors(stage: str, changes: dict[str, Any], message: str, arguments: Arguments) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainDataModule(**arguments(**changes)).setup(stage)


def test_shares_of_tokens_that_the_weights_ask_for(arguments: Arguments) -> None:
    module = PretrainDataModule(**arguments())
    module.setup("fit")
    assert module.token_shares() == pytest.approx({"zh": 0.9, "en": 0.1})


def test_weights_in_bytes_ask_for_tokens_by_what_was_read(arguments: Arguments) -> None:
    """A Chinese character is three tokens of this tokenizer, as it is three bytes: nearly the weights themselves."""
    module = PretrainDataModule(**arguments(weight_unit="bytes"))
    module.setup("fit")
    assert module.token_shares() == pytest.approx({"zh": 0.9, "en": 0.1}, abs=0.02)


BY_PROGRESS: dict[float | str, float] = {0.0: 0.5, 0.2: 0.9}


def scheduled(sources: list[Source], **changes: Any) -> dict[str, Any]:
    return {"sources": [replace(sources[0], weight=BY_PROGRESS), sources[1]]} | changes


def test_weights_by_progress_need_the_rows_of_the_run(arguments: Arguments, sources: list[Source]) -> None:
    with pytest.raises(ValueError, match=r"`trainer.max_steps=-1`: a `weight` of `sources` is by fraction of the run"):
        PretrainDataModule(**arguments(**scheduled(sources))).setup("fit")
    evaluated = PretrainDataModule(**arguments(**scheduled(sources)))
    evaluated.setup("validate")
    assert len(evaluated.val_dataloader()) > 0


def test_another_number_of_rows_is_named(arguments: Arguments, sources: list[Source]) -> None:
    module = PretrainDataModule(**arguments(**scheduled(sources, progress_rows=4000)))
    module.setup("fit")
    state = module.state_dict()
    assert state["order"]["progress_rows"] == 4000
    assert state["order"]["weight of source zh"] == "0.0: 0.5, 0.2: 0.9"
    other = PretrainDataModule(**arguments(**scheduled(sources, progress_rows=8000)))
    other.setup("fit")
    message = (
        r"of 4,000 rows in the checkpoint and of 8,000 here\. To go on .*set `data\.init_args\.progress_rows=4000`"
    )
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    same = PretrainDataModule(**arguments(**scheduled(sources, progress_rows=4000)))
    same.setup("fit")
    same.load_state_dict(state)


def test_rows_of_the_run_are_those_of_the_trainer_s_steps(arguments: Arguments, sources: list[Source]) -> None:
    module = PretrainDataModule(**arguments(**scheduled(sources)))
    assert module.rows_of_progress(100, 16) == 1600
    assert PretrainDataModule(**arguments()).rows_of_progress(-1, 16) is None
    assert PretrainDataModule(**arguments(**scheduled(sources, progress_rows=7))).rows_of_progress(-1, 16) == 7


def test_shares_asked_for_go_by_progress(arguments: Arguments, sources: list[Source]) -> None:
    changes = scheduled(sources, progress_rows=1000)
    changes["sources"][1] = replace(sources[1], weight={0.0: 0.5, 0.2: 0.1})
    module = PretrainDataModule(**arguments(**changes))
    module.setup("fit")
    assert module.token_shares(64) == pytest.approx({"zh": 0.5, "en": 0.5})
    batches = iter(module.train_dataloader())
    for _ in range(100):  # of two rows
        next(batches)
    assert module.token_shares(2)["zh"] == pytest.approx(0.9 - 0.4 * 1.5 / 200)
    assert module.token_shares()["zh"] == pytest.approx(0.7, abs=0.002)


def test_missing_files(arguments: Arguments, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`sources\[0\].path='.*'` matches no file. Give a file, a folder"):
        PretrainDataModule(**arguments(sources=[Source("zh", f"{tmp_path}/*.jsonl")])).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"`tokenizer='.*'` is not a folder"):
        PretrainDataModule(**arguments(tokenizer=str(tmp_path / "no"))).setup("fit")


def test_tokenizer_before_setup(module: PretrainDataModule) -> None:
    with pytest.raises(ValueError, match=r"Call `setup` first"):
        _ = module.tokenizer

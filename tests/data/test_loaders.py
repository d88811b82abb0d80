import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor

from lightning_mixcn.data.loaders import EvaluationLoader, RankShard, TrainLoader, batch_tensors
from lightning_mixcn.data.progress import RunProgress
from lightning_mixcn.text import (
    DocumentSet,
    EvaluationSet,
    PlainText,
    Source,
    StreamPlan,
    StreamState,
    TextTokenizer,
    all_documents,
    collate_rows,
    load_tokenizer,
    read_corpus,
    split_by_hash,
)

pytestmark = [
    # The tests ask for more workers than small machines have cores.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # From Python 3.12 on, of any fork beside a thread; torch's loader forks on purpose.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def plan(sources: list[Source], tokenizer_folder: str) -> StreamPlan:
    documents = [split_by_hash(read_corpus(source), [])[1] for source in sources]
    return StreamPlan(documents, PlainText(load_tokenizer(tokenizer_folder)), sequence_length=32, num_streams=6, seed=7)


@pytest.fixture(scope="module")
def rows(plan: StreamPlan) -> list[dict[str, Any]]:
    """Make the first rows of the run, straight from the contract: row k is row k // N of stream k % N."""
    streams = plan.open(range(plan.num_streams))
    made = [streams[row % plan.num_streams].next_row() for row in range(160)]
    return [collate_rows([row], plan.sequence_length, plan.encoder.padding_id) for row in made]


def training(agree: Callable[[bool], bool] = bool) -> Any:
    """Make what a loader looks at of a trainer that fits; `processed` counts the batches trained on."""
    trainer = SimpleNamespace(overfit_batches=0, should_stop=False, processed=0)
    trainer.state = SimpleNamespace(fn=TrainerFn.FITTING, status=TrainerStatus.RUNNING)
    trainer.strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: agree(decision))
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=trainer)))
    return trainer


def progress_at(row: int, streams: dict[int, StreamState] | None = None) -> RunProgress:
    progress = RunProgress()
    progress.load_state_dict({"rows": row, "streams": streams or {}, "order": {}})
    return progress


def batches(
    plan: StreamPlan, shard: RankShard, workers: int, count: int, progress: RunProgress | None = None, **options: Any
) -> list[dict[str, Tensor]]:
    loader = TrainLoader(plan, progress or RunProgress(), shard, workers, **options)
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def global_order(of_ranks: list[list[dict[str, Tensor]]], name: str) -> Tensor:
    """Join the rows of all ranks: micro-batch by micro-batch, rank-major within each."""
    return torch.cat([batch[name] for step in zip(*of_ranks, strict=True) for batch in step])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("micro_batch_size", "first_row"), [(1, 0), (3, 0), (4, 37)])
def test_rows_are_the_contract_s(
    ranks: int, workers: int, micro_batch_size: int, first_row: int, plan: StreamPlan, rows: list[dict[str, Any]]
) -> None:
    count = 100 // (ranks * micro_batch_size)
    shards = [RankShard(micro_batch_size, ranks, rank) for rank in range(ranks)]
    found = [batches(plan, shard, workers, count, progress_at(first_row)) for shard in shards]
    expected = rows[first_row : first_row + count * ranks * micro_batch_size]
    for name in ("input_ids", "labels", "document_ids", "position_ids", "source_ids"):
        ours = global_order(found, name)
        theirs = np.concatenate([row[name] for row in expected])
        assert ours.dtype == torch.from_numpy(theirs).dtype
        assert np.array_equal(ours.numpy(), theirs)


def test_spawned_workers_give_the_same(plan: StreamPlan) -> None:
    """A spawned worker gets pickles, as every worker does where there is no fork."""
    spawned = batches(plan, RankShard(4), 1, 6, start_method="spawn")
    for ours, theirs in zip(spawned, batches(plan, RankShard(4), 0, 6), strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


@pytest.mark.parametrize(("workers", "start_method"), [(0, None), (1, "fork"), (2, "fork"), (2, "spawn")])
def test_an_error_of_a_worker_leaves_no_process(
    workers: int, start_method: str | None, tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although a frame of the loader lives in the traceback; and the message is the worker's own."""
    monkeypatch.setenv("MIXCN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some text")
    documents = [split_by_hash(read_corpus(Source("a", str(tmp_path / "a.txt"))), [])[1]]
    plan = StreamPlan(documents, PlainText(load_tokenizer(tokenizer_folder)), sequence_length=32, num_streams=2, seed=0)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"^The unpacked texts in .* are gone"):
        batches(plan, RankShard(2), workers, 10, start_method=start_method)
    assert not active_children()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_leaves_no_process(workers: int, plan: StreamPlan) -> None:
    loader = TrainLoader(plan, RunProgress(), RankShard(2), workers)
    next(iter(loader))
    assert len(active_children()) == workers
    with pytest.raises(KeyboardInterrupt):
        loader._running.throw(KeyboardInterrupt())  # type: ignore[union-attr]  # it runs
    assert not active_children()


def test_a_worker_makes_its_own_streams_only(plan: StreamPlan) -> None:
    assert RankShard(1, 2, 0, 0).streams(6) == [0, 2, 4]
    assert RankShard(2, 3, 1, 0).streams(6) == [2, 3]
    assert RankShard(2, 3, 1, 5).streams(6) == [1, 2]
    assert RankShard(4, 1, 0, 0).streams(6) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_iter_goes_on_without_starting_again(workers: int, plan: StreamPlan) -> None:
    trainer = training()
    loader = TrainLoader(plan, RunProgress(), RankShard(2), workers, trainer)
    first = iter(loader)
    expected = batches(plan, RankShard(2), 0, 9)
    seen = list(islice(first, 4))
    trainer.processed = 4
    assert iter(loader) is first  # the workers are there already
    seen += islice(loader, 3)
    trainer.processed = 6  # the last one was fetched ahead and not used
    assert iter(loader) is not first
    seen[6:] = islice(loader, 3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(seen, expected, strict=True))
    loader.close()


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("ranks", [1, 3])
def test_sources_that_end(workers: int, ranks: int, sources: list[Source], tokenizer_folder: str) -> None:
    parts = [split_by_hash(read_corpus(replace(source, max_epochs=1)), [])[1] for source in sources]
    plan = StreamPlan(parts, PlainText(load_tokenizer(tokenizer_folder)), sequence_length=32, num_streams=4, seed=0)
    streams = plan.open(range(4))
    expected = []
    while not all(stream.exhausted for stream in streams.values()):
        expected += [stream.next_row() for stream in streams.values()]
    found = []
    for rank in range(ranks):
        found.append(batches(plan, RankShard(2, ranks, rank), workers, 1000, trainer=(trainer := training())))
        assert trainer.should_stop
    # Each rank stops by itself here: without a common decision some stop a batch early, with only padding left.
    longest = max(map(len, found))
    for of_rank in found:
        of_rank += [{"labels": torch.full((2, 32), -100)}] * (longest - len(of_rank))
    ours = global_order(found, "labels").numpy()
    theirs = collate_rows(expected, 32, 2)["labels"]
    assert np.array_equal(ours[: len(theirs)], theirs[: len(ours)])
    assert (ours[len(theirs) :] == -100).all()
    assert (theirs[len(ours) :] == -100).all()


def test_ranks_that_do_not_agree_go_on_with_padding(sources: list[Source], tokenizer_folder: str) -> None:
    parts = [split_by_hash(read_corpus(replace(sources[1], max_epochs=1)), [])[1]]
    plan = StreamPlan(parts, PlainText(load_tokenizer(tokenizer_folder)), sequence_length=4096, num_streams=2, seed=0)
    asked: list[bool] = []

    def agree(decision: bool) -> bool:
        asked.append(decision)
        return len(asked) == 6

    found = batches(plan, RankShard(2), 0, 10, trainer=training(agree))
    assert asked == [False, True, True, True, True, True]
    assert len(found) == 5
    assert all((batch["labels"] == -100).all() for batch in found[1:])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_states_are_those_after_each_batch(
    workers: int, ranks: int, plan: StreamPlan, rows: list[dict[str, Any]]
) -> None:
    """Whoever goes on from them makes the next rows, and reads nothing before."""
    of_ranks = [RunProgress() for _ in range(ranks)]
    for rank, progress in enumerate(of_ranks):
        batches(plan, RankShard(4, ranks, rank), workers, 6 // ranks, progress)
    every = [item for progress in of_ranks for item in progress.streams.items()]
    states = dict(sorted(every, key=lambda item: int(item[1]["position"])))
    (batch, *_) = batches(plan, RankShard(12), 1, 1, progress_at(24, states))
    assert np.array_equal(batch["input_ids"], np.concatenate([row["input_ids"] for row in rows[24:36]]))
    assert {stream: state["position"] for stream, state in states.items()} == dict.fromkeys(range(6), 4)


def test_lightning_takes_the_loader_for_resumable(plan: StreamPlan) -> None:
    loader = TrainLoader(plan, RunProgress(), RankShard(1), 0)
    assert isinstance(loader, _Stateful)  # what its CombinedLoader asks before it saves a loader's state


@pytest.fixture(scope="module")
def documents(sources: list[Source]) -> list[DocumentSet]:
    return [all_documents(read_corpus(source)) for source in sources]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: str) -> TextTokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def whole(documents: list[DocumentSet], tokenizer: TextTokenizer) -> EvaluationSet:
    return EvaluationSet(documents, PlainText(tokenizer), 48, max_rows=None)


def test_every_document_is_scored_once(whole: EvaluationSet, documents: list[DocumentSet]) -> None:
    sums = np.zeros((300, 2), dtype=np.int64)
    for batch in EvaluationLoader(whole, 4, num_ranks=1, rank=0):
        scored = batch["labels"] != -100
        np.add.at(sums[:, 0], batch["document_index"][scored].numpy(), batch["label_bytes"][scored].numpy())
        np.add.at(sums[:, 1], batch["document_index"][scored].numpy(), 1)
    texts = [part.text(index) for part in documents for index in range(len(part))]
    lengths = np.array([len(text.encode()) for text in texts])
    assert np.array_equal(sums[:, 0], lengths)
    assert np.array_equal(sums[:, 1], lengths + 1)  # a token a byte, and EOS


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_rows_do_not_depend_on_ranks(ranks: int, whole: EvaluationSet) -> None:
    loaders = [EvaluationLoader(whole, 4, ranks, rank) for rank in range(ranks)]
    assert len({len(loader) for loader in loaders}) == 1
    of_ranks = [list(loader) for loader in loaders]
    assert {len(batches) for batches in of_ranks} == {len(loaders[0])}
    rows = torch.cat([batch["labels"] for step in zip(*of_ranks, strict=True) for batch in step])
    alone = torch.cat([batch["labels"] for batch in EvaluationLoader(whole, 4, 1, 0)])
    count = len(whole.rows)
    assert torch.equal(rows[:count], alone[:count])
    assert (rows[count:] == -100).all()
    assert 0 <= len(rows) - count < 4 * ranks


def test_batches_have_the_stated_types(whole: EvaluationSet) -> None:
    batch = next(iter(EvaluationLoader(whole, 4, 1, 0)))
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == {
        "input_ids": ((4, 48), torch.int64),
        "labels": ((4, 48), torch.int64),
        "document_ids": ((4, 48), torch.int32),
        "position_ids": ((4, 48), torch.int64),
        "source_ids": ((4, 48), torch.int16),
        "continuation_mask": ((4, 48), torch.bool),
        "label_bytes": ((4, 48), torch.int32),
        "text_mask": ((4, 48), torch.bool),
        "document_index": ((4, 48), torch.int64),
    }


def test_a_cap_takes_the_first_rows_of_each_source(
    whole: EvaluationSet, documents: list[DocumentSet], tokenizer: TextTokenizer
) -> None:
    capped = EvaluationSet(documents, PlainText(tokenizer), 48, max_rows=5)
    assert [row[0].source for row in capped.rows] == [0] * 5 + [1] * 5
    first_english = next(index for index, row in enumerate(whole.rows) if row[0].source == 1)
    wanted = whole.rows[:5] + whole.rows[first_english : first_english + 5]
    for ours, theirs in zip(capped.rows, wanted, strict=True):
        assert [part.tokens.tolist() for part in ours] == [part.tokens.tolist() for part in theirs]


def test_origins(whole: EvaluationSet) -> None:
    assert len(whole) == 300
    assert [(whole.origin(i).source, whole.origin(i).record) for i in (0, 199, 200, 299)] == [
        ("zh", 1),
        ("zh", 200),
        ("en", 1),
        ("en", 100),
    ]
    with pytest.raises(IndexError, match=r"`index=300`: the evaluation set has documents 0 to 299"):
        whole.origin(300)


def arrays() -> dict[str, np.ndarray]:
    return {"input_ids": np.arange(6).reshape(2, 3), "document_ids": np.zeros((2, 3), dtype=np.int32)}


def test_without_cuda_nothing_is_copied() -> None:
    given = arrays()
    made = batch_tensors(given)
    assert {name: tensor.dtype for name, tensor in made.items()} == {
        "input_ids": torch.int64,
        "document_ids": torch.int32,
    }
    given["input_ids"][0, 0] = 7
    assert made["input_ids"].tolist() == [[7, 1, 2], [3, 4, 5]]


def test_where_cuda_is_in_use_memory_is_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 100)
    made = batch_tensors(arrays())
    assert made["input_ids"].tolist() == [[100, 101, 102], [103, 104, 105]]
    assert made["document_ids"].tolist() == [[100] * 3] * 2


@pytest.mark.gpu
def test_page_locked_memory() -> None:
    torch.cuda.init()
    made = batch_tensors(arrays())
    assert all(tensor.is_pinned() for tensor in made.values())
    assert made["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]]

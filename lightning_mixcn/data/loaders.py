"""Training batches: the rows of the run in their order, shared out over ranks and loader workers.

Batch i of a rank holds rows ``first + (i * ranks + rank) * micro_batch_size`` and the following. Each worker owns some
of the rank's streams and sends, for each batch, the rows of its streams; the rank's own process lays them out. So
no worker computes another's rows. A rank does compute and drop another rank's rows if they share a stream, which
happens only if ``ranks * micro_batch_size`` does not divide ``num_streams``.
"""

from __future__ import annotations

import itertools
from collections.abc import (
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lightning_mixcn.text import (
    DocumentEncoder,
    DocumentOrigin,
    DocumentSet,
    Row,
    RowStream,
    RowTable,
    ScoredRow,
    StreamPlan,
    StreamState,
    collate_evaluation_rows,
    collate_table,
    evaluation_rows,
)

from .workers import worker_messages


def batch_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Give a batch's arrays as tensors, page-locked where this process uses CUDA.

    Lightning copies a batch without waiting. That is so from page-locked memory only: from any other, CUDA lets the
    host wait until the device has done all that it was told before.

    Args:
        arrays: ``[B, S]`` each.

    Returns:
        The same, which share the arrays' memory where CUDA is not in use.
    """
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return tensors


# Behind a batch: the state of each stream that a worker has rows of, and whether all its streams are at their end.
Behind = tuple[dict[int, StreamState], bool]
# A worker's part of some consecutive batches: its rows, numbered through all of them, and what is behind each batch.
Message = tuple[RowTable, list[Behind]]
# Several batches at once cost less; a message is of few at first, for training to begin soon.
_DOUBLINGS = 3  # to 8 batches a message


@dataclass(frozen=True)
class Schedule:
    """Which rows of the run are a rank's.

    Args:
        micro_batch_size: Rows of a batch on one rank.
        num_ranks: Number of ranks that read different rows.
        rank: This rank among them.
        first_row: Row of the run at which batch 0 of rank 0 begins.
        states: Where streams stand, at that row or before; a stream without is at its beginning.
    """

    micro_batch_size: int
    num_ranks: int
    rank: int
    first_row: int
    states: Mapping[int, StreamState] = field(default_factory=dict, compare=False)

    def rows(self, batch: int) -> range:
        """Rows of the run in batch `batch` of this rank."""
        start = self.first_row + (batch * self.num_ranks + self.rank) * self.micro_batch_size
        return range(start, start + self.micro_batch_size)

    def behind(self, batches: int) -> Schedule:
        """Get the schedule that goes on after so many batches."""
        return replace(self, first_row=self.first_row + batches * self.num_ranks * self.micro_batch_size)

    def streams(self, num_streams: int) -> list[int]:
        """Streams of which this rank ever reads rows."""
        return sorted({row % num_streams for batch in range(num_streams) for row in self.rows(batch)})


class TrainLoader:
    """Endless (or, if every source has `max_epochs`, long) iterable of training batches for one rank.

    Each ``iter()`` continues behind the rows already consumed. `batches_given` counts the batches handed out.

    Args:
        plan: What decides the order of rows.
        make_schedule: Called at each ``iter()``: where to go on.
        num_workers: Processes that tokenize; 0 tokenizes in the training process.
        all_ranks_agree: Whether all ranks pass True; called once a batch if the sources end.
        on_batch: Called with the states of the streams behind each batch that is handed out.
        on_end: Called when the sources have ended.
        start_method: How worker processes start: `fork`, `spawn`, `forkserver`, or None for the platform's default.
    """

    def __init__(
        self,
        plan: StreamPlan,
        make_schedule: Callable[[], Schedule],
        num_workers: int,
        *,
        all_ranks_agree: Callable[[bool], bool] = bool,
        on_batch: Callable[[dict[int, StreamState]], None] = lambda states: None,
        on_end: Callable[[], None] = lambda: None,
        start_method: str | None = None,
    ) -> None:
        """Keep the arguments; nothing starts before ``iter()``."""
        self._plan = plan
        self._make_schedule = make_schedule
        self._num_workers = num_workers
        self._all_ranks_agree = all_ranks_agree
        self._on_batch = on_batch
        self._on_end = on_end
        self._start_method = start_method
        self._ends = all(documents.corpus.source.max_epochs is not None for documents in plan.documents)
        self.batches_given = 0
        self._running: Generator[dict[str, Tensor]] | None = None
        self._running_next: Schedule | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Give batches from the first row that was not consumed.

        Workers that stand there already, as at the end of an epoch by `limit_train_batches`, simply go on.
        """
        schedule = self._make_schedule()
        if self._running is None or schedule != self._running_next:
            self.close()
            self._running, self._running_next = self._batches(schedule), schedule
        return self._running

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module's state has it all. To Lightning a loader without a state is one that repeats."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""

    def close(self) -> None:
        """Stop the workers now: left to the garbage collector, they would outlive the loader."""
        if self._running is not None:
            self._running.close()
        self._running = self._running_next = None

    def _batches(self, schedule: Schedule) -> Generator[dict[str, Tensor]]:
        for number, (batch, behind) in enumerate(self._laid_out(schedule), start=1):
            if self._ends and self._all_ranks_agree(all(ended for _, ended in behind)):
                self._on_end()
                return
            self.batches_given += 1
            self._on_batch({stream: state for states, _ in behind for stream, state in states.items()})
            self._running_next = schedule.behind(number)
            yield batch

    def _laid_out(self, schedule: Schedule) -> Iterator[tuple[dict[str, Tensor], tuple[Behind, ...]]]:
        """Batches, with what each worker says is behind them."""
        messages, rows = self._messages(schedule), schedule.micro_batch_size
        while True:
            tables, behinds = zip(*(next(messages) for _ in range(max(1, self._num_workers))), strict=True)
            isolated = self._plan.packing != "concatenate"
            arrays = collate_table(RowTable.joined(tables), self._plan.sequence_length, isolated=isolated)
            for batch, behind in enumerate(zip(*behinds, strict=True)):
                part = slice(batch * rows, (batch + 1) * rows)
                yield batch_tensors({name: array[part] for name, array in arrays.items()}), behind

    def _messages(self, schedule: Schedule) -> Iterator[Message]:
        """One message of each worker in turn."""
        return worker_messages(_Messages(self._plan, schedule), self._num_workers, self._start_method)


class RepeatedBatches:
    """The next batches of a run again and again, for `trainer.overfit_batches`; the run itself stays where it is.

    Args:
        loader: Gives the batches, once; they are kept in memory.
        count: Number of batches, or fewer where the sources end before.
        batches_trained: Counts the batches of this rank that were trained on, of a resumed run all of them.
    """

    def __init__(self, loader: TrainLoader, count: int, batches_trained: Callable[[], int]) -> None:
        """Keep the arguments."""
        self._loader = loader
        self._count = count
        self._batches_trained = batches_trained

    @cached_property
    def _batches(self) -> list[dict[str, Tensor]]:
        try:
            return list(itertools.islice(self._loader, self._count))
        finally:
            self._loader.close()

    def __len__(self) -> int:
        """Count the batches; all ranks must call it, since it reads them."""
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Give them from the first one on, or where a resumed run stopped between them."""
        return iter(self._batches[self._batches_trained() % len(self) :])

    def close(self) -> None:
        """Stop the workers; they live only while the batches are read."""
        self._loader.close()

    def state_dict(self) -> dict[str, Any]:
        """Nothing, as `TrainLoader.state_dict`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""


class _Messages(IterableDataset[Message]):
    """What one worker sends."""

    def __init__(self, plan: StreamPlan, schedule: Schedule) -> None:
        self._plan = plan
        self._schedule = schedule

    def __iter__(self) -> Iterator[Message]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        num_streams = self._plan.num_streams
        streams = self._plan.open(self._schedule.streams(num_streams)[number::count], self._schedule.states)
        first = 0
        for message in itertools.count():
            batches = 1 << min(message, _DOUBLINGS) if worker else 1
            yield self._message(streams, range(first, first + batches))
            first += batches

    def _message(self, streams: dict[int, RowStream], batches: range) -> Message:
        rows, behind = list[tuple[int, Row]](), list[Behind]()
        num_streams = self._plan.num_streams
        for batch in batches:
            ended = all(stream.exhausted for stream in streams.values())
            states = {}
            first_place = (batch - batches.start) * self._schedule.micro_batch_size
            for place, row in enumerate(self._schedule.rows(batch), start=first_place):
                index = row % num_streams
                if index in streams:
                    rows.append((place, _row_at(streams[index], row // num_streams)))
                    states[index] = streams[index].state()
            behind.append((states, ended))
        return RowTable.of(rows, self._plan.sequence_length, self._plan.encoder.padding_id), behind


def _row_at(stream: RowStream, position: int) -> Row:
    """Row `position` of a stream that stands at it or before; the rows between are other ranks', or were consumed."""
    while stream.position < position:
        stream.next_row()
    return stream.next_row()


class EvaluationSet:
    """Documents of several sources as rows, tokenized once and held in memory.

    Args:
        documents: The documents of each source.
        encoder: What makes tokens of them.
        sequence_length: Tokens of a row.
        max_rows: Rows kept of each source; None keeps all. The last document of a capped source may be cut.
    """

    def __init__(
        self, documents: Sequence[DocumentSet], encoder: DocumentEncoder, sequence_length: int, max_rows: int | None
    ) -> None:
        """Tokenize the documents."""
        self.sequence_length = sequence_length
        self.padding_id = encoder.padding_id
        self._documents = documents
        self._firsts = [0, *itertools.accumulate(len(part) for part in documents)]
        self.rows: list[ScoredRow] = []
        for source, part in enumerate(documents):
            rows = evaluation_rows(part, encoder, sequence_length, source=source, first_document=self._firsts[source])
            self.rows += itertools.islice(rows, max_rows)

    def __len__(self) -> int:
        """Count the documents, before any cap."""
        return self._firsts[-1]

    def origin(self, index: int) -> DocumentOrigin:
        """Tell where the document that batches call `index` was read.

        Raises:
            IndexError: There is no such document.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"`index={index}`: the evaluation set has documents 0 to {len(self) - 1}")
        source = next(source for source, first in enumerate(self._firsts[1:]) if index < first)
        return self._documents[source].origin(index - self._firsts[source])


class EvaluationLoader:
    """The batches of one rank.

    Batch i of all ranks together is the next ``num_ranks * micro_batch_size`` rows, rank-major; empty rows, all
    padding, fill the last one.

    Args:
        evaluation_set: The rows.
        micro_batch_size: Rows of a batch on one rank.
        num_ranks: Number of ranks that read different rows.
        rank: This rank among them.
    """

    def __init__(self, evaluation_set: EvaluationSet, micro_batch_size: int, num_ranks: int, rank: int) -> None:
        """Keep the arguments."""
        self._set = evaluation_set
        self._micro_batch_size = micro_batch_size
        self._num_ranks = num_ranks
        self._rank = rank

    def __len__(self) -> int:
        """Count the batches, the same on every rank."""
        return -(-len(self._set.rows) // (self._micro_batch_size * self._num_ranks))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Give the rank's batches."""
        for batch in range(len(self)):
            start = (batch * self._num_ranks + self._rank) * self._micro_batch_size
            rows = self._set.rows[start : start + self._micro_batch_size]
            rows += [()] * (self._micro_batch_size - len(rows))
            yield batch_tensors(collate_evaluation_rows(rows, self._set.sequence_length, self._set.padding_id))

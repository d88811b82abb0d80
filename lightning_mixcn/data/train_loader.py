"""Training batches: the rows of the run in their order, shared out over ranks and loader workers.

Batch i of a rank holds rows ``first + (i * ranks + rank) * micro_batch_size`` and the following. Each worker owns some
of the rank's streams and sends, for each batch, the rows of its streams; the rank's own process puts them in order. So
no worker computes another's rows. A rank does compute and drop another rank's rows if they share a stream, which
happens only if ``ranks * micro_batch_size`` does not divide ``num_streams``.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_mixcn.text import Row, RowStream, StreamPlan, StreamState, collate_rows

# A worker's part of a batch: (place in the batch, row) of its rows, the state of each stream behind them, and whether
# all its streams are at their end.
Share = tuple[list[tuple[int, Row]], dict[int, StreamState], bool]
# A worker sends its parts of several batches at once, which costs less; of few at first, for training to begin soon.
_DOUBLINGS = 3  # to 8 batches a message
# Python 3.14 would import everything anew in each worker, which takes ten seconds.
_FASTEST_START = "fork" if sys.platform == "linux" else None


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
        for batch, received in enumerate(self._received(schedule), start=1):
            if self._ends and self._all_ranks_agree(all(ended for _, _, ended in received)):
                self._on_end()
                return
            rows = dict(place_and_row for share, _, _ in received for place_and_row in share)
            arrays = collate_rows(
                [rows[place] for place in range(schedule.micro_batch_size)],
                self._plan.sequence_length,
                self._plan.tokenizer.eos_id,
                isolated=self._plan.packing != "concatenate",
            )
            self.batches_given += 1
            self._on_batch({stream: state for _, states, _ in received for stream, state in states.items()})
            self._running_next = schedule.behind(batch)
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _received(self, schedule: Schedule) -> Iterator[tuple[Share, ...]]:
        """The parts of all workers, batch by batch."""
        messages = self._messages(schedule)
        while True:
            of_workers = [next(messages) for _ in range(max(1, self._num_workers))]
            yield from zip(*of_workers, strict=True)

    def _messages(self, schedule: Schedule) -> Iterator[list[Share]]:
        loader = DataLoader(
            _Shares(self._plan, schedule),
            batch_size=None,
            collate_fn=_identity,
            num_workers=self._num_workers,
            prefetch_factor=2 if self._num_workers else None,
            multiprocessing_context=(self._start_method or _FASTEST_START) if self._num_workers else None,
        )
        with _one_thread_in_workers():
            messages: Iterator[list[Share]] = iter(loader)
        return messages


class _Shares(IterableDataset[list[Share]]):
    """One worker's part of every batch, in messages."""

    def __init__(self, plan: StreamPlan, schedule: Schedule) -> None:
        self._plan = plan
        self._schedule = schedule

    def __iter__(self) -> Iterator[list[Share]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        num_streams = self._plan.num_streams
        streams = self._plan.open(self._schedule.streams(num_streams)[number::count], self._schedule.states)
        shares = map(partial(self._share, streams), itertools.count())
        for message in itertools.count():
            yield list(itertools.islice(shares, 1 << min(message, _DOUBLINGS) if worker else 1))

    def _share(self, streams: dict[int, RowStream], batch: int) -> Share:
        ended = all(stream.exhausted for stream in streams.values())
        num_streams = self._plan.num_streams
        rows = enumerate(self._schedule.rows(batch))
        mine = [(place, row) for place, row in rows if row % num_streams in streams]
        made = [(place, _row_at(streams[row % num_streams], row // num_streams)) for place, row in mine]
        return made, {row % num_streams: streams[row % num_streams].state() for _, row in mine}, ended


def _row_at(stream: RowStream, position: int) -> Row:
    """Row `position` of a stream that stands at it or before; the rows between are other ranks', or were consumed."""
    while stream.position < position:
        stream.next_row()
    return stream.next_row()


def _identity(share: Any) -> Any:
    return share


@contextmanager
def _one_thread_in_workers() -> Iterator[None]:
    """Forked tokenizers must not use the threads of their parent; what the child inherits says so without a warning."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

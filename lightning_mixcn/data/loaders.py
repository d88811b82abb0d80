"""Training batches: the rows of the run in their order, divided among ranks and loader workers.

Batch i of a rank holds rows ``first_row + (i * ranks + rank) * micro_batch_size`` and the following. Each worker owns
some of the rank's streams and sends, for each batch, the rows of its streams; the rank's own process lays them out. So
no worker computes another's rows. A rank computes and drops rows of another rank if they share a stream, which happens
only if ``ranks * micro_batch_size`` does not divide ``num_streams``.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, islice
from multiprocessing import active_children
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_mixcn.errors import UserError
from lightning_mixcn.text import (
    EvaluationSet,
    Row,
    RowStream,
    RowTable,
    StreamPlan,
    StreamState,
    collate_evaluation_rows,
    collate_tables,
)
from lightning_mixcn.text.corpus.unpack import end_with_parent

from .progress import RunProgress

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from numpy.typing import NDArray

# Several batches in a chunk cost less; the first chunks have few, so that training begins soon.
_DOUBLINGS = 3  # to 8 batches a chunk
# Chunks a worker may be ahead: texts differ in length, and with two a worker often waited for another one's.
_PREFETCHED = 8
# Python 3.14 would import everything again in each worker, which takes ten seconds.
_FASTEST_START = "fork" if sys.platform == "linux" else None


def batch_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Make tensors of a batch's arrays, page-locked where this process uses CUDA.

    Lightning copies a batch without waiting. That works from page-locked memory only: from any other, CUDA makes the
    host wait until the device has finished all earlier work.

    Args:
        arrays: Arrays ``[B, S]`` by name.

    Returns:
        The same, which share the arrays' memory where CUDA is not in use.
    """
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return tensors


@dataclass(frozen=True)
class RankShard:
    """Rows of the run that one rank trains on.

    Args:
        micro_batch_size: Rows of a batch on one rank.
        num_ranks: Number of ranks that read different rows.
        rank: Index of this rank among them.
        first_row: Row of the run at which batch 0 of rank 0 begins.
    """

    micro_batch_size: int
    num_ranks: int = 1
    rank: int = 0
    first_row: int = 0

    @property
    def rows_a_batch(self) -> int:
        """Rows of a batch of all ranks together."""
        return self.micro_batch_size * self.num_ranks

    def rows(self, batch: int) -> range:
        """Return the rows of the run in batch `batch` of this rank."""
        start = self.first_row + batch * self.rows_a_batch + self.rank * self.micro_batch_size
        return range(start, start + self.micro_batch_size)

    def streams(self, num_streams: int) -> list[int]:
        """List the streams of which this rank ever reads rows."""
        return sorted({row % num_streams for batch in range(num_streams) for row in self.rows(batch)})


class TrainLoader:
    """Endless (or, if every source has `max_epochs`, long) iterable of training batches for one rank.

    Each ``iter()`` continues after the rows that were consumed: those that the trainer has trained on while it fits,
    else those that were given.

    Args:
        plan: Settings that decide the order of rows.
        progress: Place to continue from; it gets the streams' states after each batch that is given.
        shard: Rank's share of the rows; its first row is the progress's.
        num_workers: Processes that tokenize; 0 tokenizes in the training process.
        trainer: Trainer whose ranks decide together when the sources have ended, and which is stopped then.
        start_method: Start of worker processes: `fork`, `spawn`, `forkserver`, or None for the fastest.
    """

    def __init__(
        self,
        plan: StreamPlan,
        progress: RunProgress,
        shard: RankShard,
        num_workers: int,
        trainer: Trainer | None = None,
        *,
        start_method: str | None = None,
    ) -> None:
        """Keep the arguments; nothing starts before ``iter()``."""
        self._plan = plan
        self._progress = progress
        self._shard = shard
        self._num_workers = num_workers
        self._trainer = trainer
        self._start_method = start_method
        self._batches_given = 0
        self._running: Generator[dict[str, Tensor]] | None = None
        self._next_row = -1  # first row after the batches that `_running` gave

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Give batches from the first row that was not consumed.

        Workers that are there already, as at the end of an epoch by `limit_train_batches`, simply go on.
        """
        state = self._trainer.state if self._trainer is not None else None
        if state is not None and state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING:
            # Lightning fetches a batch ahead: only what it has processed is consumed.
            self._progress.begin(self._batches_trained, self._shard.rows_a_batch)
        else:
            self._progress.begin(lambda: self._batches_given, self._shard.rows_a_batch)
        if self._running is None or self._progress.rows != self._next_row:
            self.close()
            self._next_row = self._progress.rows
            self._running = self._batches(replace(self._shard, first_row=self._next_row))
        return self._running

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module has the state. To Lightning a loader without one is one that repeats."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned: nothing."""

    def close(self) -> None:
        """Stop the workers now: left to the garbage collector, they would outlive the loader."""
        if self._running is not None:
            self._running.close()
        self._running = None

    def _batches_trained(self) -> int:
        assert self._trainer is not None
        return batches_trained(self._trainer)

    def _batches(self, shard: RankShard) -> Generator[dict[str, Tensor]]:
        plan, size = self._plan, shard.micro_batch_size
        may_end = all(documents.corpus.source.max_epochs is not None for documents in plan.documents)
        dataset = _ChunkDataset(plan, shard, dict(self._progress.streams))
        chunks = worker_chunks(dataset, self._num_workers, self._start_method)
        while True:
            parts = [next(chunks) for _ in range(max(1, self._num_workers))]
            tables = [part.table for part in parts]
            isolated, has_sides = plan.packing != "concatenate", plan.encoder.has_sides
            arrays = collate_tables(tables, plan.sequence_length, isolated=isolated, has_sides=has_sides)
            for batch, ends in enumerate(zip(*(part.ends for part in parts), strict=True)):
                if may_end and self._all_ranks_ended(all(end.exhausted for end in ends)):
                    return
                rows = slice(batch * size, (batch + 1) * size)
                self._batches_given += 1
                self._next_row += shard.rows_a_batch
                self._progress.hand_out({stream: state for end in ends for stream, state in end.states.items()})
                yield batch_tensors({name: array[rows] for name, array in arrays.items()})

    def _all_ranks_ended(self, this_one: bool) -> bool:
        """Decide together whether training ends, and stop the trainer then."""
        trainer = self._trainer
        if trainer is None:
            return this_one
        ended = trainer.strategy.reduce_boolean_decision(this_one, all=True)
        if ended and not overfit_batches(trainer):
            rank_zero_info("The sources have been read `max_epochs` times: training ends.")
            trainer.should_stop = True
        return ended


def batches_trained(trainer: Trainer) -> int:
    """Count the batches of this rank that were trained on, in a resumed run all of them."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress  # Lightning types `total` too narrowly
    return int(batches.total.processed)


def overfit_batches(trainer: Any) -> int:
    """Read the trainer's setting, which Lightning sets outside of the class; 0 without a trainer."""
    return int(trainer.overfit_batches) if trainer is not None else 0


class RepeatedBatches:
    """The next batches of a run again and again, for `trainer.overfit_batches`; the run itself stays where it is.

    Args:
        loader: Loader of the batches, read once; they are kept in memory.
        trainer: Trainer with the number of batches; there are fewer where the sources end before.
    """

    def __init__(self, loader: TrainLoader, trainer: Trainer) -> None:
        """Keep the arguments."""
        self._loader = loader
        self._trainer = trainer

    @cached_property
    def _batches(self) -> list[dict[str, Tensor]]:
        try:
            return list(islice(self._loader, overfit_batches(self._trainer)))
        finally:
            self._loader.close()

    def __len__(self) -> int:
        """Count the batches; all ranks must call it, since it reads them."""
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Give them from the first one on, or where a resumed run stopped between them."""
        return iter(self._batches[batches_trained(self._trainer) % len(self) :])

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, as `TrainLoader.state_dict`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned: nothing."""


class BatchEnd(NamedTuple):
    """State of each stream that a worker read for a batch, after it; and whether all its streams had ended before."""

    states: dict[int, StreamState]
    exhausted: bool


class WorkerChunk(NamedTuple):
    """A worker's rows of some consecutive batches, numbered through all of them, and its state after each batch."""

    table: RowTable
    ends: list[BatchEnd]


class _ChunkDataset(IterableDataset[WorkerChunk | Exception]):
    """Chunks of the worker that iterates: the rows of some of the rank's streams, from `states` on.

    A stream without a state is at its beginning. The user's errors are given instead of a chunk: torch would hand over
    their text alone.
    """

    def __init__(self, plan: StreamPlan, shard: RankShard, states: Mapping[int, StreamState]) -> None:
        self._plan = plan
        self._shard = shard
        self._states = states

    def __iter__(self) -> Iterator[WorkerChunk | Exception]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            own = self._shard.streams(self._plan.num_streams)[number::num_workers]
            streams = self._plan.open(own, self._states)
            first = 0
            for chunk in count():
                batches = range(first, first + (1 << min(chunk, _DOUBLINGS) if worker else 1))
                yield self._chunk(streams, batches)
                first = batches.stop
        except (UserError, OSError) as error:
            error.add_note(traceback.format_exc())  # it is lost between processes
            yield error

    def _chunk(self, streams: dict[int, RowStream], batches: range) -> WorkerChunk:
        rows, ends = list[tuple[int, Row]](), list[BatchEnd]()
        num_streams, size = self._plan.num_streams, self._shard.micro_batch_size
        for batch in batches:
            exhausted = all(stream.exhausted for stream in streams.values())
            states = {}
            for place, number in enumerate(self._shard.rows(batch), start=(batch - batches.start) * size):
                position, index = divmod(number, num_streams)
                if (stream := streams.get(index)) is not None:
                    while stream.position < position:  # rows of other ranks, or consumed before
                        stream.next_row()
                    rows.append((place, stream.next_row()))
                    states[index] = stream.state()
            ends.append(BatchEnd(states, exhausted))
        return WorkerChunk(RowTable.of(rows, self._plan.sequence_length, self._plan.encoder.padding_id), ends)


def worker_chunks(
    dataset: IterableDataset[WorkerChunk | Exception], num_workers: int, start_method: str | None = None
) -> Iterator[WorkerChunk]:
    """Iterate over the chunks of each worker in turn; no worker outlives the iterator.

    Args:
        dataset: Dataset that asks `get_worker_info` which worker it is in.
        num_workers: Processes; 0 iterates in this one.
        start_method: Start of the processes: `fork`, `spawn`, `forkserver`, or None for the fastest.

    Yields:
        Chunks.

    Raises:
        UserError, OSError: Raised by a worker, with its traceback as a note.
        Exception: Another error of a worker, as torch hands it over.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_identity,
        worker_init_fn=_live_as_long_as_the_run,
        num_workers=num_workers,
        prefetch_factor=_PREFETCHED if num_workers else None,
        multiprocessing_context=(start_method or _FASTEST_START) if num_workers else None,
    )
    others = set(active_children())
    chunks: Any = None
    try:
        with _one_thread_in_workers():
            chunks = iter(loader)
        for chunk in chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk
    finally:
        # Left to the garbage collector, workers live as long as an error's traceback; and a process that exits sends
        # them SIGTERM, which they ignore, and waits for them without end.
        if num_workers:
            if chunks is not None:
                chunks._shutdown_workers()  # torch has no public way
            for worker in set(active_children()) - others:
                worker.kill()
                worker.join()


def _identity(chunk: Any) -> Any:
    return chunk


def _live_as_long_as_the_run(worker: int) -> None:
    # SLURM signals every process of a job, and a terminal every process of its group: workers have to live until the
    # run has ended its step and saved.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # torch's workers notice a killed parent, too, but then wait until what they have sent is read: for ever.
    end_with_parent()


@contextmanager
def _one_thread_in_workers() -> Iterator[None]:
    """Keep forked tokenizers from using the threads of their parent; set in the environment, it gives no warning."""
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


class EvaluationLoader:
    """Evaluation batches of one rank.

    Batch i of all ranks together is the next ``num_ranks * micro_batch_size`` rows, rank-major; empty rows, all
    padding, fill the last one.

    Args:
        evaluation_set: Rows of all ranks.
        micro_batch_size: Rows of a batch on one rank.
        num_ranks: Number of ranks that read different rows.
        rank: Index of this rank among them.
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
            length, padding_id, has_sides = self._set.sequence_length, self._set.padding_id, self._set.has_sides
            yield batch_tensors(collate_evaluation_rows(rows, length, padding_id, has_sides=has_sides))

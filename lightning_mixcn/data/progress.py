"""Progress of a run in its sequence of rows, and what that sequence depends on: the state of a checkpoint."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.schema import FLAG, PLAIN, TEXT, each, first_fault, mapping_of, real, record, row_of, whole
from lightning_mixcn.text import StreamPlan, StreamState
from lightning_mixcn.text.corpus.sources import weight_points

Order = dict[str, str | int | float | None]

# Changed with whatever decides the rows besides an order's other values.
_MIXING = "by row number"


_REMEDY = "Restore the checkpoint from a copy, or go on from another one"

_COUNT = whole(0, 2**53)
_NUMBER = real(-(2.0**53), 2.0**53)
# See `RowStream.state`; a list of each has an entry a source.
_STREAM = {
    "position": _COUNT,
    "documents": each(row_of(_COUNT, _COUNT)),
    "read": each(row_of(_COUNT, real(0, 2.0**53))),
    "served": each(_COUNT),
    "phases": each(_NUMBER),
    "pools": each(each(row_of(_COUNT, _COUNT, _COUNT, FLAG))),
    "too_long": each(row_of(_COUNT, _COUNT, _COUNT)),
}
_STATE = record(
    {
        "rows": _COUNT,
        "streams": mapping_of(whole(0, 2**31), record({"position": _COUNT})),
        "order": mapping_of(TEXT, PLAIN),
    }
)


class RunProgress:
    """Rows that all ranks together have trained on, and the streams' states after them, for checkpoints.

    Rows that loaders or Lightning have fetched ahead are not counted: batches are counted where they are consumed.
    """

    _count_batches: Callable[[], int]

    def __init__(self) -> None:
        """Begin at the first row of a sequence that is not known yet."""
        self._plan: StreamPlan | None = None
        self._order: Order | None = None
        self._saved_order: Mapping[str, Any] | None = None
        self._go_to(0, {})

    @property
    def rows(self) -> int:
        """Rows consumed since the beginning of the run."""
        return self._rows_before + self._batches() * self._rows_a_batch

    @property
    def streams(self) -> dict[int, StreamState]:
        """States of the streams that this rank reads after the rows consumed; others are as they were loaded."""
        while self._ahead and self._ahead[0][0] <= self._batches():
            self._streams |= self._ahead.popleft()[1]
        return self._streams

    def begin(self, count_batches: Callable[[], int], rows_a_batch: int) -> None:
        """Count from now on in batches; what was handed out and not consumed will be made again.

        Args:
            count_batches: Function that counts the batches consumed, from any beginning; it only grows.
            rows_a_batch: Rows in the batches of all ranks together.
        """
        self._go_to(self.rows, self.streams)
        self._count_batches, self._batches_before, self._rows_a_batch = count_batches, count_batches(), rows_a_batch

    def copy(self) -> RunProgress:
        """Make another count that begins at the same row."""
        made = RunProgress()
        made._go_to(self.rows, self.streams)
        return made

    def hand_out(self, states: dict[int, StreamState]) -> None:
        """Note the streams' states after the next batch of this rank."""
        self._handed_out += 1
        self._ahead.append((self._handed_out, states))

    def set_order(self, order: Order, plan: StreamPlan | None = None) -> None:
        """Set what the sequence of rows depends on.

        Args:
            order: Result of `order_of`.
            plan: Plan of the sequence, in which loaded states are to have a place.

        Raises:
            ValueError: A state was loaded, of a run with another sequence, or that is no place in this one.
        """
        self._plan, self._order = plan, order
        self._require_saved_order()
        if plan is not None and self._saved_order is not None:
            check_positions(plan, self.rows, self.streams)

    def state_dict(self, of_all_ranks: Callable[[Any], Sequence[Any]] = lambda mine: [mine]) -> dict[str, Any]:
        """Return rows, streams and order, in plain values; nothing before `set_order`.

        Args:
            of_all_ranks: Function that gathers an object of every rank.
        """
        if self._order is None:
            return {}
        streams: dict[int, StreamState] = {}
        for of_rank in of_all_ranks(self.streams):
            for stream, state in of_rank.items():
                if stream not in streams or state["position"] > streams[stream]["position"]:
                    streams[stream] = state
        return {"rows": self.rows, "streams": dict(sorted(streams.items())), "order": dict(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the rows of a saved state.

        Raises:
            ValueError: The sequence of rows is another, and the message names what changed; or the state is no place
                in it.
        """
        if fault := first_fault(state, _STATE):
            raise UserError(f"The checkpoint's position in the data: {fault}. {_REMEDY}")
        self._saved_order = state["order"]
        self._go_to(state["rows"], state["streams"])
        self._require_saved_order()
        if self._plan is not None:
            check_positions(self._plan, state["rows"], state["streams"])

    def _go_to(self, rows: int, streams: Mapping[int, StreamState]) -> None:
        self._rows_before, self._rows_a_batch, self._batches_before = rows, 0, 0
        self._streams, self._ahead, self._handed_out = dict(streams), deque[tuple[int, dict[int, StreamState]]](), 0
        self._count_batches = int

    def _batches(self) -> int:
        return self._count_batches() - self._batches_before

    def _require_saved_order(self) -> None:
        """Compare as soon as both are known; evaluation alone may use other sources than the run did."""
        if self._order is not None and self._saved_order is not None:
            require_same_order(self._saved_order, self._order)


def check_positions(plan: StreamPlan, rows: int, streams: Mapping[int, StreamState]) -> None:
    """Check that the streams' states are places in the sequence of a plan, after so many rows of all together.

    Offsets within a document are checked where it is read: only its text says how many tokens it has.

    Args:
        plan: Sources, encoder and settings.
        rows: Rows consumed.
        streams: State of each stream that is not at its beginning.

    Raises:
        ValueError: A stream is missing, or is at another row, source or document than it can be.
    """
    expected = {stream: len(range(stream, rows, plan.num_streams)) for stream in range(plan.num_streams)}
    for stream in sorted({*streams, *(stream for stream, position in expected.items() if position)}):
        fault = (
            f"there is no stream {stream} of {plan.num_streams}"
            if stream not in expected
            else f"stream {stream} is missing"
            if stream not in streams
            else _fault_of_stream(plan, stream, expected[stream], streams[stream])
        )
        if fault:
            raise UserError(f"The checkpoint's position in the data, after {rows:,} rows: {fault}. {_REMEDY}")


def _fault_of_stream(plan: StreamPlan, stream: int, position: int, state: StreamState) -> str | None:
    """Say what is wrong with a stream's state."""
    if fault := first_fault(state, record(_STREAM)):
        return f"of stream {stream}, {fault}"
    sources = len(plan.documents)
    for key in _STREAM.keys() - {"position"}:
        if len(state[key]) != sources:
            return f"stream {stream} has `{key}` of {len(state[key])} sources, expected {sources}"
    if state["position"] != position:
        return f"stream {stream} is at row {state['position']:,} of its own, expected {position:,}"
    if sum(state["served"]) > position * plan.sequence_length:
        return f"stream {stream} has given {sum(state['served']):,} tokens, more than its rows hold"
    for source, documents in enumerate(plan.documents):
        (number, offset), (tokens, _) = state["documents"][source], state["read"][source]
        waiting = state["pools"][source]
        where = f"stream {stream} of source {documents.name!r}"
        if tokens != state["served"][source] + sum(length for _, _, length, _ in waiting):
            return f"{where} has read {tokens:,} tokens, other than those that it gave and keeps"
        size = len(documents.corpus)
        # Each document that was passed gave a token at least, or was dropped, refused or held out.
        dropped, _, refused = state["too_long"][source]
        held_out = len(documents.held_out) * (number // size + 1)
        if number // plan.num_streams > tokens + dropped + refused + held_out:
            return f"{where} is at document {number:,}, which its {tokens:,} tokens do not reach"
        for place, *_ in (*waiting, *([(number,)] if offset else [])):
            if place % plan.num_streams != stream or place > number:
                return f"{where} has document {place:,}, which is not dealt to it"
            if documents.index_of(place, plan.seed) not in documents:
                return f"{where} has document {place:,}, which is held out"
    return None


def order_of(plan: StreamPlan) -> Order:
    """Collect what the sequence of rows depends on, in plain values.

    Args:
        plan: Sources, encoder and settings.

    Returns:
        Values by name. Texts and tokenizer are given as digests, so that a moved file changes nothing.
    """
    order: Order = {
        "mixing": _MIXING,
        "packing": plan.packing,
        "sequence_length": plan.sequence_length,
        "num_streams": plan.num_streams,
        "seed": plan.seed,
        **plan.encoder.fingerprint,
        "sources": ", ".join(documents.name for documents in plan.documents),
    }
    for documents in plan.documents:
        source = documents.corpus.source
        by_progress, weights = weight_points(source.weight)
        points = ", ".join(f"{fraction}: {weight}" for fraction, weight in zip(by_progress, weights, strict=True))
        order[f"weight of source {source.name}"] = weights[0] if len(weights) == 1 else points
        order[f"max_epochs of source {source.name}"] = source.max_epochs
        order[f"training texts of source {source.name}"] = documents.fingerprint
    if plan.weight_unit != "tokens":  # checkpoints of runs that had no choice name none
        order["weight_unit"] = plan.weight_unit
    if plan.by_progress:
        order["progress_rows"] = plan.progress_rows
    return order


def require_same_order(saved: Mapping[str, Any], current: Order) -> None:
    """Raise unless a run can go on where another one stopped.

    Args:
        saved: Order in the checkpoint.
        current: Order of this run.

    Raises:
        ValueError: They differ; the message names each difference.
    """
    if "mixing" not in saved and "mixing" in current:
        raise UserError(
            "The checkpoint's sequence of training rows cannot be continued: it was made by a version that trained on "
            "the sources in blocks, and rows are now interleaved from the first one on. Begin a new run from its "
            "adapter (`model.init_args.adapter`)."
        )
    names = list(dict.fromkeys([*saved, *current]))
    changed = [
        f"`{name}` was {saved.get(name)!r} and is {current.get(name)!r}"
        for name in names
        if saved.get(name) != current.get(name)
    ]
    rows, now = saved.get("progress_rows"), current.get("progress_rows")
    if len(changed) == 1 and rows and now and rows != now:
        raise UserError(
            f"Weights of `sources` are fractions of a run of {rows:,} rows in the checkpoint and of {now:,} here. To "
            f"go on with the same rows, set `data.init_args.progress_rows={rows}`: past them the last weights hold"
        )
    if changed:
        raise UserError(
            f"The checkpoint's sequence of training rows cannot be continued: {'; '.join(changed)}. Restore these "
            "settings, files and the split (`val_fraction`, `test_fraction`), or begin a new run from its adapter."
        )

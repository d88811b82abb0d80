"""Progress of a run in its sequence of rows, and what that sequence depends on: the state of a checkpoint."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_mixcn.errors import UserError
from lightning_mixcn.text import StreamPlan, StreamState

Order = dict[str, str | int | float | None]

# Changed with whatever decides the rows besides an order's other values.
_MIXING = "by row number"


class RunProgress:
    """Rows that all ranks together have trained on, and the streams' states after them, for checkpoints.

    Rows that loaders or Lightning have fetched ahead are not counted: batches are counted where they are consumed.
    """

    _count_batches: Callable[[], int]

    def __init__(self) -> None:
        """Begin at the first row of a sequence that is not known yet."""
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

    def set_order(self, order: Order) -> None:
        """Set what the sequence of rows depends on.

        Raises:
            ValueError: A state was loaded, of a run with another sequence.
        """
        self._order = order
        self._require_saved_order()

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
            ValueError: The sequence of rows is another; the message names what changed.
        """
        self._saved_order = state["order"]
        self._go_to(state["rows"], state["streams"])
        self._require_saved_order()

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
        order[f"weight of source {source.name}"] = float(source.weight)
        order[f"max_epochs of source {source.name}"] = source.max_epochs
        order[f"training texts of source {source.name}"] = documents.fingerprint
    if plan.weight_unit != "tokens":  # checkpoints of runs that had no choice name none
        order["weight_unit"] = plan.weight_unit
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
    if changed:
        raise UserError(
            f"The checkpoint's sequence of training rows cannot be continued: {'; '.join(changed)}. Restore these "
            "settings, files and the split (`val_fraction`, `test_fraction`), or begin a new run from its adapter."
        )

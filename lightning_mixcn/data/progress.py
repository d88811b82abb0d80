"""How far a run has come in its sequence of rows, and what that sequence depends on: the state of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_mixcn.text import StreamPlan

Order = dict[str, str | int | float | None]


class RunProgress:
    """The rows that all ranks together have trained on, for checkpoints.

    Rows that loaders or Lightning have fetched ahead are not counted: batches are counted where they are consumed.
    """

    _count_batches: Callable[[], int]

    def __init__(self) -> None:
        """Stand before the first row of a sequence that is not known yet."""
        self._order: Order | None = None
        self._saved_order: Mapping[str, Any] | None = None
        self._stand_at(0)

    @property
    def rows(self) -> int:
        """Rows consumed since the beginning of the run."""
        return self._rows_before + (self._count_batches() - self._batches_before) * self._rows_a_batch

    def begin(self, count_batches: Callable[[], int], rows_a_batch: int) -> None:
        """Count from now on in batches.

        Args:
            count_batches: Gives the number of batches consumed, from any beginning; it only grows.
            rows_a_batch: Rows in the batches of all ranks together.
        """
        self._rows_before = self.rows
        self._count_batches, self._batches_before, self._rows_a_batch = count_batches, count_batches(), rows_a_batch

    def set_order(self, order: Order) -> None:
        """Say what the sequence of rows depends on.

        Raises:
            ValueError: A state was loaded, of a run with another sequence.
        """
        self._order = order
        self._require_saved_order()

    def state_dict(self) -> dict[str, Any]:
        """Give rows and order, in plain values; nothing before `set_order`."""
        return {} if self._order is None else {"rows": self.rows, "order": dict(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand behind the rows of a saved state.

        Raises:
            ValueError: The sequence of rows is another; the message names what changed.
        """
        self._saved_order = state["order"]
        self._stand_at(state["rows"])
        self._require_saved_order()

    def _stand_at(self, rows: int) -> None:
        self._rows_before, self._rows_a_batch, self._batches_before = rows, 0, 0
        self._count_batches = int

    def _require_saved_order(self) -> None:
        """Compare as soon as both are known; evaluation alone may use other sources than the run did."""
        if self._order is not None and self._saved_order is not None:
            require_same_order(self._saved_order, self._order)


def order_of(plan: StreamPlan, packing: str) -> Order:
    """Write down what the sequence of rows depends on, in plain values.

    Args:
        plan: Sources, tokenizer and settings.
        packing: How documents are packed into rows.

    Returns:
        Values by name. Texts and tokenizer are given as digests, so that a moved file changes nothing.
    """
    order: Order = {
        "packing": packing,
        "sequence_length": plan.sequence_length,
        "num_streams": plan.num_streams,
        "seed": plan.seed,
        "tokenizer": plan.tokenizer.fingerprint,
        "sources": ", ".join(documents.name for documents in plan.documents),
    }
    for documents in plan.documents:
        source = documents.corpus.source
        order[f"weight of source {source.name}"] = float(source.weight)
        order[f"max_epochs of source {source.name}"] = source.max_epochs
        order[f"training texts of source {source.name}"] = documents.fingerprint
    return order


def require_same_order(saved: Mapping[str, Any], current: Order) -> None:
    """Raise unless a run can go on where another one stopped.

    Args:
        saved: The order in the checkpoint.
        current: The order of this run.

    Raises:
        ValueError: They differ; the message names each difference.
    """
    names = list(dict.fromkeys([*saved, *current]))
    changed = [
        f"`{name}` was {saved.get(name)!r} and is {current.get(name)!r}"
        for name in names
        if saved.get(name) != current.get(name)
    ]
    if changed:
        raise ValueError(
            f"The checkpoint's sequence of training rows cannot be continued: {'; '.join(changed)}. Restore these "
            "settings, files and the split (`val_fraction`, `test_fraction`), or begin a new run from its adapter."
        )

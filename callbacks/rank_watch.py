"""A rank that dies makes the others stop and say so."""

import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed

from .heartbeats import Beat, Heartbeats

_REMEDY = "Start all ranks again with --ckpt_path last"
# Beats that may be late or lost before a rank whose connection broke counts as the one that died.
_PATIENCE_BEATS = 3
_LOST_PEER = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)


class RankWatch(Callback):
    """Ends this rank when another one dies, with a message on stderr that names it; one rank alone watches nothing.

    Each rank tells the others every few seconds that it lives, in a thread of its own and through the store in which
    their process group met, so a collective that hangs does not hide it. A rank whose collective fails waits a little
    to learn which one is missing. This sees processes, nodes and networks that are gone; a process that lives but does
    not go on is left to the process group's own timeout.

    Args:
        timeout_seconds: A rank that has not been heard of for so long counts as dead. Longer than any pause in which a
            process holds Python's global lock.
    """

    def __init__(self, timeout_seconds: float = 60.0) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"`timeout_seconds={timeout_seconds}`: expected more than 0 seconds")
        self.timeout_seconds = timeout_seconds
        self._watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        if trainer.world_size > 1 and distributed.is_available() and distributed.is_initialized():
            # A connection of its own: a collective that waits in the group's blocks that one.
            store: Any = distributed.distributed_c10d._get_default_store()
            store = store.clone()  # torch's types lack it
            store.set_timeout(timedelta(seconds=self.timeout_seconds))
            own = Beat(trainer.global_rank, socket.gethostname(), os.getpid())
            self._watch = Watch(store, own, trainer.world_size, self.timeout_seconds)
            self._watch.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the step from now on."""
        if self._watch is not None:
            self._watch.own = replace(self._watch.own, step=trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others why this rank ends, or learn which one made it fail.

        The watch goes on: it ends the process should Lightning's own tidying hang.
        """
        if self._watch is None:
            return
        self._watch.ending = True
        if not _lost_peer(exception):
            reason = f"{type(exception).__name__}: {' '.join(str(exception).split())}"
            self._watch.own = replace(self._watch.own, failure=reason[:500])
        elif culprit := self._watch.await_culprit():
            _say(self._watch.own, culprit)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop together: a rank that ends first would seem dead, and the store may be in its process."""
        if self._watch is not None:
            trainer.strategy.barrier("rank_watch")
            self._watch.stop()
            self._watch = None


class Watch:
    """Two threads: one exchanges beats, and blocks if the store's host is gone; the other one judges.

    Args:
        store: A connection of its own to the group's store.
        own: What this rank tells at first.
        ranks: Number of ranks.
        timeout_seconds: As in RankWatch.
        end: Ends the process; it is told why.
    """

    def __init__(
        self,
        store: Any,
        own: Beat,
        ranks: int,
        timeout_seconds: float,
        end: Callable[[Beat, str], None] | None = None,
    ) -> None:
        self.own = own
        self.ending = False  # this rank ends by itself, and may not be cut off before the timeout
        self._timeout_seconds = timeout_seconds
        self._interval_seconds = min(5.0, timeout_seconds / 10)
        self._heartbeats = Heartbeats(store, ranks, self._interval_seconds)
        self._end = end or _end
        self._stopped = threading.Event()
        # Counted like silence, see `Heartbeats`.
        self._waits_since_answer = 0
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._exchange, self._judge)]

    def start(self) -> None:
        """Begin to tell and to hear."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads; one that waits for a store that is gone is left behind."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * self._interval_seconds)

    def await_culprit(self) -> str | None:
        """Wait until it is clear which rank is gone, but only some beats. Returns: which one, in words."""
        patience = _PATIENCE_BEATS * self._interval_seconds
        for _ in range(2 * _PATIENCE_BEATS):
            if culprit := self._heartbeats.failed() or self._missing(patience):
                return culprit
            self._stopped.wait(self._interval_seconds)
        return None

    def _exchange(self) -> None:
        number = 0
        while not self._stopped.is_set():
            number += 1
            try:
                self._heartbeats.exchange(replace(self.own, number=number))
            except RuntimeError:
                return  # torch does not connect anew; `_judge` sees that nothing is heard any more
            self._waits_since_answer = 0
            self._stopped.wait(self._interval_seconds)

    def _judge(self) -> None:
        waits_since_failure = 0
        while not self._stopped.wait(self._interval_seconds):
            self._waits_since_answer += 1
            reason = self._missing(self._timeout_seconds)
            if not self.ending and (failed := self._heartbeats.failed()):
                # An error that all ranks meet ends each of them by itself.
                waits_since_failure += 1
                reason = failed if waits_since_failure > _PATIENCE_BEATS else reason
            if reason and not self._stopped.is_set():
                self._end(self.own, reason)
                return

    def _missing(self, seconds: float) -> str | None:
        if self._waits_since_answer * self._interval_seconds > seconds:
            return f"the store in which all ranks met, rank 0's or its launcher's, has not answered for {seconds:.0f} s"
        return self._heartbeats.silent(seconds)


def _lost_peer(exception: BaseException) -> bool:
    """Whether an error looks like a collective's whose other end is gone."""
    if isinstance(exception, distributed.DistError):
        return True
    return isinstance(exception, RuntimeError) and _LOST_PEER.search(str(exception)) is not None


def _say(own: Beat, reason: str) -> None:
    print(f"RankWatch: {reason}; {own} stops in optimizer step {own.step}. {_REMEDY}", file=sys.stderr, flush=True)


def _end(own: Beat, reason: str) -> None:
    _say(own, reason)
    sys.stdout.flush()
    os._exit(1)  # the main thread may hang in a collective for ever

"""A rank that dies makes the others stop and say so."""

import atexit
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # torch does not say that it exports it

from lightning_mixcn.errors import UserError

_FAILURE = "failure"


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself.

    Args:
        rank: Its number.
        host: Name of its machine.
        pid: Its process.
        step: Optimizer steps it has done.
        failure: The error that ends it, or nothing.
        number: Counts the beats; another number means that the rank lives.
    """

    rank: int
    host: str
    pid: int
    step: int = 0
    failure: str = ""
    number: int = 0

    def __str__(self) -> str:
        """Name the rank for a person."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


class Heartbeats:
    """Tells and hears beats. A rank lives when its beat has changed.

    Silence is counted in exchanges, not by a clock: time in which a scheduler suspends all processes must not count.

    Args:
        store: A connection of its own to the group's store: `torch.distributed.Store`.
        ranks: Number of ranks.
        interval_seconds: Between exchanges.
    """

    def __init__(self, store: Any, ranks: int, interval_seconds: float) -> None:
        self._store = store
        self._ranks = ranks
        self._interval_seconds = interval_seconds
        # For each other rank its newest beat, and the exchanges since that was new.
        self._heard: dict[int, tuple[Beat | None, int]] = {}
        self._failure: Beat | None = None

    def exchange(self, own: Beat) -> None:
        """Tell the own beat and hear the others'. Raises: RuntimeError, or blocks, if the store is gone."""
        self._store.set(_key(own.rank), json.dumps(asdict(own)))
        for rank in range(self._ranks):
            if rank != own.rank:
                key = _key(rank)
                beat = Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None
                before, silence = self._heard.get(rank, (None, 0))
                self._heard[rank] = beat, silence + 1 if beat == before else 0

    def exchange_failure(self, own: Beat) -> None:
        """Tell that this rank fails, or hear that another one does: a request or two, for more often than beats.

        Raises:
            RuntimeError: The store is gone.
        """
        if self._failure is not None:
            return
        if own.failure:
            self._store.set(_FAILURE, json.dumps(asdict(own)))
            self._failure = own
        elif self._store.check([_FAILURE]):
            self._failure = Beat(**json.loads(self._store.get(_FAILURE)))
        else:
            return
        self._store.set(_heard_key(own.rank), "")

    def failure_is_known(self) -> bool:
        """Whether every rank has told or heard of a failure. Raises: RuntimeError if the store is gone."""
        return bool(self._store.check([_heard_key(rank) for rank in range(self._ranks)]))

    def silent(self, seconds: float) -> str | None:
        """The first rank that was not heard of for longer than that, in words."""
        for rank, (beat, silence) in sorted(self._heard.copy().items()):
            if (silent_seconds := silence * self._interval_seconds) > seconds:
                known = f"{beat} has not been heard of for" if beat else f"rank {rank} was never heard of in"
                step = f", last in optimizer step {beat.step}" if beat else ""
                return f"{known} {silent_seconds:.0f} s{step}"
        return None

    def failed(self) -> str | None:
        """The rank that said what ends it, in words."""
        beat = self._failure
        return f"{beat} stopped in optimizer step {beat.step}: {beat.failure}" if beat else None


def _key(rank: int) -> str:
    return f"beat of {rank}"


def _heard_key(rank: int) -> str:
    return f"{_FAILURE}/heard by {rank}"


_RUNS = itertools.count()
_REMEDY = "Start all ranks again with --ckpt_path last"
# Beats that may be late or lost before a rank whose connection broke counts as the one that died.
_PATIENCE_BEATS = 3
# Between looks for another rank's error: one request to the store each, where a beat takes some for each rank.
_LOOK_SECONDS = 1.0
# From hearing of another rank's error to the end: an error that all ranks meet is to end each of them by itself.
# Lightning's launcher looks every 5 s whether a child has ended, and then kills rank 0, whose exit code is the
# command's. So rank 0 of each node ends first.
_GRACE_SECONDS, _GRACE_OF_CHILDREN_SECONDS = 2.0, 6.0
# A failing rank stays so long at most, for the others to hear why; its end would break their connections.
_STAY_SECONDS = 10.0
_LOST_PEER = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)


class RankWatch(Callback):
    """Ends this rank when another one dies, with a message on stderr that names it; one rank alone watches nothing.

    Each rank tells the others every few seconds that it lives, in a thread of its own and through the store in which
    their process group met, so a collective that hangs does not hide it. A rank that ends with an error tells it at
    once, and the others end within seconds, with exit code 1. A rank whose collective fails waits a little to learn
    which one is missing. This sees processes, nodes and networks that are gone; a process that lives but does
    not go on is left to the process group's own timeout.

    Args:
        timeout_seconds: A rank that has not been heard of for so long counts as dead. Longer than any pause in which a
            process holds Python's global lock.
    """

    def __init__(self, timeout_seconds: float = 60.0) -> None:
        if timeout_seconds <= 0:
            raise UserError(f"`timeout_seconds={timeout_seconds}`: expected more than 0 seconds")
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
            # What an earlier run in these processes told is not this one's; every rank counts alike.
            store = PrefixStore(f"rank_watch/{next(_RUNS)}", store)
            own = Beat(trainer.global_rank, socket.gethostname(), os.getpid())
            grace = _GRACE_SECONDS if trainer.local_rank == 0 else _GRACE_OF_CHILDREN_SECONDS
            self._watch = Watch(store, own, trainer.world_size, self.timeout_seconds, grace_seconds=grace)
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
            environment = getattr(trainer.strategy, "cluster_environment", None)
            is_child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
            # After an interrupt of rank 0 Lightning kills its children at once.
            if is_child or not isinstance(exception, KeyboardInterrupt):
                # At exit, so after the message was printed. A child of Lightning's launcher must not end before rank 0.
                atexit.register(self._watch.stay, os.getppid() if is_child else None)
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
        grace_seconds: From hearing of another rank's error to the end of this process.
    """

    def __init__(
        self,
        store: Any,
        own: Beat,
        ranks: int,
        timeout_seconds: float,
        end: Callable[[Beat, str], None] | None = None,
        grace_seconds: float = _GRACE_SECONDS,
    ) -> None:
        self.own = own
        self.ending = False  # this rank ends by itself, and may not be cut off before the timeout
        self._timeout_seconds, self._grace_seconds = timeout_seconds, grace_seconds
        self._interval_seconds = min(5.0, timeout_seconds / 10)
        self._look_seconds = min(_LOOK_SECONDS, self._interval_seconds)
        self._heartbeats = Heartbeats(store, ranks, self._interval_seconds)
        self._end = end or _end
        self._stopped = threading.Event()
        self._known = False  # whether all ranks have heard that this one failed
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

    def stay(self, parent: int | None) -> None:
        """Delay the end of this process, which failed, until the others can do without it, but not for long.

        Args:
            parent: Process that has to end first; None waits only until the others have heard of the failure.
        """
        looks = round(_STAY_SECONDS / self._look_seconds)
        while looks > 0 and not self._known and self._threads[0].is_alive():
            looks -= 1
            self._stopped.wait(self._look_seconds)
        self.stop()
        while looks > 0 and parent is not None and os.getppid() == parent:
            looks -= 1
            time.sleep(self._look_seconds)

    def await_culprit(self) -> str | None:
        """Wait until it is clear which rank is gone, but only some beats. Returns: which one, in words."""
        patience = _PATIENCE_BEATS * self._interval_seconds
        for _ in range(round(2 * patience / self._look_seconds)):
            if culprit := self._heartbeats.failed() or self._missing(patience):
                return culprit
            self._stopped.wait(self._look_seconds)
        return None

    def _exchange(self) -> None:
        number, looks = 0, round(self._interval_seconds / self._look_seconds)
        try:
            while True:
                number += 1
                self._heartbeats.exchange(replace(self.own, number=number))
                for _ in range(looks):
                    self._heartbeats.exchange_failure(self.own)
                    self._known = self.own.failure != "" and self._heartbeats.failure_is_known()
                    self._waits_since_answer = 0
                    if self._stopped.wait(self._look_seconds):
                        return
        except RuntimeError:
            return  # torch does not connect again; `_judge` sees that nothing is heard any more

    def _judge(self) -> None:
        looks_since_failure = 0
        while not self._stopped.wait(self._look_seconds):
            self._waits_since_answer += 1
            reason = self._missing(self._timeout_seconds)
            if not self.ending and (failed := self._heartbeats.failed()):
                looks_since_failure += 1
                reason = failed if looks_since_failure * self._look_seconds > self._grace_seconds else reason
            if reason and not self._stopped.is_set():
                self._end(self.own, reason)
                return

    def _missing(self, seconds: float) -> str | None:
        if self._waits_since_answer * self._look_seconds > seconds:
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

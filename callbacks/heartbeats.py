"""What ranks know of each other's life, through the store in which their process group met."""

import json
from dataclasses import asdict, dataclass
from typing import Any

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

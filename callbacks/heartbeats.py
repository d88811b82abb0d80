"""What ranks know of each other's life, through the store in which their process group met."""

import json
from dataclasses import asdict, dataclass
from typing import Any


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

    def exchange(self, own: Beat) -> None:
        """Tell the own beat and hear the others'. Raises: RuntimeError, or blocks, if the store is gone."""
        self._store.set(_key(own.rank), json.dumps(asdict(own)))
        for rank in range(self._ranks):
            if rank != own.rank:
                key = _key(rank)
                beat = Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None
                before, silence = self._heard.get(rank, (None, 0))
                self._heard[rank] = beat, silence + 1 if beat == before else 0

    def silent(self, seconds: float) -> str | None:
        """The first rank that was not heard of for longer than that, in words."""
        for rank, (beat, silence) in sorted(self._heard.copy().items()):
            if (silent_seconds := silence * self._interval_seconds) > seconds:
                known = f"{beat} has not been heard of for" if beat else f"rank {rank} was never heard of in"
                step = f", last in optimizer step {beat.step}" if beat else ""
                return f"{known} {silent_seconds:.0f} s{step}"
        return None

    def failed(self) -> str | None:
        """The first rank that said what ends it, in words."""
        for _, (beat, _) in sorted(self._heard.copy().items()):
            if beat and beat.failure:
                return f"{beat} stopped in optimizer step {beat.step}: {beat.failure}"
        return None


def _key(rank: int) -> str:
    return f"rank_watch/{rank}"

"""How much of which source is trained on, and how long training waits for it."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mixcn.files.schema import TEXT, mapping_of, record
from lightning_mixcn.modules.checkpoint_schema import COUNT, require_state

from .clocks import step_clock

# Difference between a source's share of tokens and the share asked for that is warned of, and the rows that hold the
# weights as closely for any number of streams: in fewer, a row of one source is a large share.
_SHARE_TOLERANCE, _LEAST_ROWS = 0.05, 64


class DataMonitor(Callback):
    """Logs under ``data/`` what the data module feeds, every ``trainer.log_every_n_steps`` optimizer steps.

    ``<source>/tokens`` are all tokens of a source that were trained on since the beginning of the run, by all ranks;
    they go on exactly when a run is resumed. ``<source>/token_share`` is the source's share of the tokens of the last
    2 × ``num_streams`` rows (of 64 if these are fewer), and ``<source>/token_share_asked`` the share that the sources'
    weights ask for in these rows, where the data module has a method `token_shares(last_rows)`; a difference of more
    than 5 points in a whole window, before any source ends, is warned of once. ``padding_share`` is the share of
    positions that are padding, since the last log. ``seconds_waiting`` are the seconds since the last log in which the
    training loop had asked the loader for a batch and had not got it, on the rank that waited longest, and
    ``wait_share`` is their share of the time since then without validation. Where the data module has methods `epochs`,
    `too_long`, `refused` or `bad_records`, they tell ``<source>/epoch``, ``<source>/dropped`` and
    ``<source>/shortened``, ``<source>/refused``, and ``bad_records``. Without `source_names`, as in a data module of
    your own, only the waiting is logged.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}  # of all ranks
        self._logged_tokens: dict[str, int] = {}  # the same, at the last log
        self._padding = self._positions = 0  # of all ranks, since the last log
        self._names: list[str] = []
        self._counts: Tensor | None = None  # of this rank, not in the sums above yet: padding, then each source
        self._logged_at = 0
        self._trainer: Trainer | None = None
        self._recent: deque[tuple[int, dict[str, int]]] = deque()  # positions and tokens, of all ranks, between logs
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the sources' names, and find the run's clock."""
        if stage != "fit":
            return
        names = getattr(getattr(trainer, "datamodule", None), "source_names", None)
        self._names = names("train") if names else []
        self._counts = None
        self._trainer, self._clock = trainer, step_clock(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the first window; that of a resumed run begins where it goes on."""
        self._logged_at = trainer.global_step
        self._padding = self._positions = 0
        self._recent.clear()
        self._logged_tokens = dict(self._tokens)
        self._window_start, self._waited = self._clock.seconds, self._clock.waited_seconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log where a step ended that is a multiple of ``log_every_n_steps``."""
        if self._names and isinstance(batch, Mapping) and "source_ids" in batch:
            self._count(batch["source_ids"])
        host: Any = trainer
        step, every_n_steps = trainer.global_step, host.log_every_n_steps
        # Micro-batches of the next step still see this step's number.
        if every_n_steps and step % every_n_steps == 0 and step != self._logged_at:
            self._logged_at = step
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up what came after the last log, while all ranks are there."""
        self._sum_up()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the trainer."""
        self._trainer = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the trainer."""
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """Return tokens of each source; Lightning calls this on every rank, as it must."""
        self._sum_up()
        return {"tokens": dict(self._tokens)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        require_state(self, state_dict, record({"tokens": mapping_of(TEXT, COUNT)}))
        self._tokens = dict(state_dict["tokens"])

    def _count(self, source_ids_BS: Tensor) -> None:
        """Count on the device, without waiting for it: `bincount` would."""
        bin_N = source_ids_BS.flatten().long() + 1
        if self._counts is None:
            self._counts = bin_N.new_zeros(len(self._names) + 1)
        self._counts.scatter_add_(0, bin_N, torch.ones_like(bin_N))

    def _sum_up(self) -> None:
        """Move the counts of all ranks to the sums; called on all of them at the same time."""
        if self._counts is None or self._trainer is None:
            return
        trainer, counts = self._trainer, self._counts
        self._counts = None
        padding, *tokens = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self._padding += padding
        self._positions += padding + sum(tokens)
        for name, count in zip(self._names, tokens, strict=True):
            self._tokens[name] = self._tokens.get(name, 0) + count

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sum_up()
        values: dict[str, float] = {f"data/{name}/tokens": self._tokens.get(name, 0) for name in self._names}
        if self._positions:
            values["data/padding_share"] = self._padding / self._positions
        data = getattr(trainer, "datamodule", None)
        values |= self._recent_shares(trainer, data) | _of_data_module(data) | self._waiting(trainer)
        self._padding = self._positions = 0
        # float64, or Lightning would round counts to float32.
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        pl_module.log_dict(tensors, batch_size=1)

    def shares(self, data: Any) -> dict[str, tuple[float, float]]:
        """Give each source's share of all tokens trained on, and the share that its weight asks for.

        While `fit` runs, all ranks must call it.

        Args:
            data: The data module; without a method `token_shares` there is no share to compare with.
        """
        self._sum_up()
        return _beside(self._tokens, data.token_shares()) if hasattr(data, "token_shares") else {}

    def _recent_shares(self, trainer: Trainer, data: Any) -> dict[str, float]:
        """Move the window of rows on, and warn if it does not hold the sources' weights."""
        if not hasattr(data, "token_shares"):
            return {}
        new = {name: count - self._logged_tokens.get(name, 0) for name, count in self._tokens.items()}
        self._logged_tokens = dict(self._tokens)
        self._recent.append((self._positions, new))
        wanted = max(2 * data.num_streams, _LEAST_ROWS) * data.sequence_length
        while (seen := sum(positions for positions, _ in self._recent)) - self._recent[0][0] >= wanted:
            self._recent.popleft()
        counts = {name: sum(tokens.get(name, 0) for _, tokens in self._recent) for name in self._names}
        shares = _beside(counts, data.token_shares(seen // data.sequence_length))
        off = {name: pair for name, pair in shares.items() if abs(pair[0] - pair[1]) > _SHARE_TOLERANCE}
        host: Any = trainer
        # Where a source has ended the others take its place, and repeated batches hold what they hold.
        if off and not self._warned and seen >= wanted and not host.overfit_batches and not data.ended_sources():
            self._warned = True
            found = ", ".join(f"{name} {share:.1%} (asked for {asked:.1%})" for name, (share, asked) in off.items())
            rank_zero_warn(f"The last rows do not hold the weights of `sources`, in tokens: {found}.")
        return {
            f"data/{name}/token_share{which}": value
            for name, pair in shares.items()
            for which, value in zip(("", "_asked"), pair, strict=True)
        }

    def _waiting(self, trainer: Trainer) -> dict[str, float]:
        """Close the window of time and open the next one."""
        now, waits = self._clock.seconds, self._clock.waited_seconds
        spent = torch.tensor([waits - self._waited, now - self._window_start], dtype=torch.float64)
        self._window_start, self._waited = now, waits
        waited, elapsed = trainer.strategy.reduce(spent.to(trainer.strategy.root_device), reduce_op="max").tolist()
        return {"data/seconds_waiting": waited, "data/wait_share": waited / elapsed if elapsed else 0.0}


def _beside(tokens: Mapping[str, int], asked: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Divide counts by their sum, beside the shares asked for."""
    total = sum(tokens.get(name, 0) for name in asked)
    return {name: (tokens.get(name, 0) / total, share) for name, share in asked.items()} if total else {}


def _of_data_module(data: Any) -> dict[str, float]:
    """Collect the figures that a data module keeps of itself."""
    values: dict[str, float] = {}
    if hasattr(data, "epochs"):
        values |= {f"data/{name}/epoch": fraction for name, fraction in data.epochs().items()}
    if hasattr(data, "too_long"):
        for name, (dropped, shortened) in data.too_long().items():
            if dropped or shortened:
                values |= {f"data/{name}/dropped": dropped, f"data/{name}/shortened": shortened}
    if hasattr(data, "refused"):
        values |= {f"data/{name}/refused": count for name, count in data.refused().items() if count}
    if hasattr(data, "bad_records"):
        values["data/bad_records"] = data.bad_records()
    return values

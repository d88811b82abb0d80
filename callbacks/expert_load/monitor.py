"""Watch how tokens are shared out among the experts, while the model trains.

Legend: L layers, E experts, N sources.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_mixcn.arguments import Between, Steps, check_arguments
from lightning_mixcn.callbacks.host import causal_lm, log_figures
from lightning_mixcn.data import PreferenceDataModule
from lightning_mixcn.errors import UserError
from lightning_mixcn.metrics.expert_load import LoadSums, jensen_shannon_bits, shares
from lightning_mixcn.model.experts.block import Router
from lightning_mixcn.model.experts.observe import observe_routing
from lightning_mixcn.modules.checkpoint_schema import require_state

from .report import (
    FIRST_NUMBERS,
    ExpertLoadFile,
    ExpertLoadRow,
    divergence_tags,
    entropy_figure,
    layer_tags,
    load_figure,
    load_tags,
)
from .window import SIDES, LoadWindow, StarvingExperts

_PREFIX = {"train": "experts", "val": "experts/val"}
_STAGES = {"train": "training", "val": "validation"}


class ExpertLoadMonitor(Callback):
    """Logs under ``experts/`` how tokens are shared out among the experts, and appends their counts to ``experts.csv``.

    Training is logged every so often, over the steps since the last log and the tokens of all ranks; validation after
    each pass, under ``experts/val/``. There are means over the layers of imbalance, dead experts and routing entropy,
    ``source_divergence_bits``, how differently the sources use the experts, and ``drift_bits``, how far the shares have
    moved from those of the run's first log: both are Jensen-Shannon divergences, 0 to 1 bit for two. With a
    `PreferenceDataModule`, ``side_divergence_bits`` is that of the two sides' answers, without their prompts. With
    `all_numbers`, ``…_worst_layer`` is a number's worst layer's, ``experts/<source>/`` has all numbers of each source's
    tokens, and ``experts/chosen/`` and ``experts/rejected/`` those of the two sides. Padding is not counted, nor is
    what activation checkpointing computes again.

    The heatmap is of the shares relative to uniform ones, 1 / E. A second figure of validation has the routing entropy
    of each source in every layer, beside that of the check before training (``trainer.num_sanity_val_steps``; -1 checks
    all of the text), whose counts are the stage ``base`` of ``experts.csv``.

    Args:
        every_n_steps: Optimizer steps between logs of training; a log waits for the device, and sums over the ranks.
        figure_every_n_steps: Optimizer steps at least between heatmaps of training; one takes a third of a second.
        all_numbers: Also log the other numbers, the worst layers' and those of each source and side: 14 a source.
        per_layer: Also log every number of each layer, and of up to 16 experts every share, under ``experts/layer_00/``
            and so on: many tags.
        position_boundaries: Positions in a document, such as 512 and 4096, at which buckets begin that are logged
            apart, under ``experts/position_from_512/`` and so on; empty logs none.
        starving_share: An expert starves below this many uniform shares of its layer's tokens.
        starving_steps: Optimizer steps after which a starving expert is warned of.
    """

    run_files = ("experts.csv",)

    def __init__(
        self,
        every_n_steps: Steps = 10,
        figure_every_n_steps: Steps = 500,
        all_numbers: bool = False,
        per_layer: bool = False,
        position_boundaries: Sequence[Annotated[int, Between(1, 2**20)]] = (),
        starving_share: Annotated[
            float, Between(0, 1, "(0 for no warning, 1 is a uniform share)", excluded=(1,))
        ] = 0.1,
        starving_steps: Steps = 200,
    ) -> None:
        check_arguments(ExpertLoadMonitor, locals())
        if list(position_boundaries) != sorted({*position_boundaries}):
            raise UserError(f"`position_boundaries={list(position_boundaries)}`: expected ascending ones, e.g. [512]")
        self.every_n_steps, self.figure_every_n_steps = every_n_steps, figure_every_n_steps
        self.all_numbers, self.per_layer = all_numbers, per_layer
        self.position_boundaries = list(position_boundaries)
        self._starving = StarvingExperts(starving_share, starving_steps)
        self._windows: dict[str, LoadWindow] = {}
        self._open: LoadWindow | None = None  # of the batch that is in its forward pass
        self._observation = ExitStack()
        self._trainer: Trainer | None = None
        self._base_shares_LE: Tensor | None = None
        self._base_entropy: dict[str, Tensor] = {}  # of each source, [L]
        self._base_rows: list[ExpertLoadRow] = []
        self._logged_at = 0
        self._drawn_at: int | None = None
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module."""
        causal_lm(self, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to observe, now that the model is there and where it belongs."""
        model = causal_lm(self, pl_module).model  # not another one that a subclass has, such as a reference
        assert model is not None
        self._observation = observe_routing(model, self._observe)
        routers = [module for module in model.modules() if isinstance(module, Router)]
        data = getattr(trainer, "datamodule", None)
        names, has_sides = getattr(data, "source_names", None), isinstance(data, PreferenceDataModule)
        for stage in ("train", "val"):
            sources = names(stage) if names else []
            for name in ("val", *(SIDES if has_sides else ())):
                if name in sources:
                    what = "validation is" if name == "val" else "a side of the pairs is"
                    raise UserError(f"A source is named {name!r}, as {what} under `experts/`. Give it another name")
            sizes = len(routers), routers[0].num_experts
            window = LoadWindow(sources, self.position_boundaries, *sizes, pl_module.device, has_sides)
            self._windows[stage] = window
        self._trainer, self._base_entropy, self._base_rows = trainer, {}, []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the window of a checkpoint, or open the first one."""
        self._file = ExpertLoadFile(Path(trainer.default_root_dir, "experts.csv"))
        self._windows["train"].clear()
        self._logged_at, self._drawn_at = trainer.global_step, None
        if trainer.global_step == 0:
            self._base_shares_LE = None
            self._starving.load_state_dict({"steps": None})
        if (state := self._restored) is not None:
            self._restored = None
            require_state(self, state, self._windows["train"].structure_of_state())
            self._base_shares_LE = state["base_shares"]
            self._base_entropy = state.get("base_entropy", {})
            self._starving.load_state_dict(state["starving"])
            if self._windows["train"].load_state_dict(state["window"]):
                self._logged_at = state["logged_at"]
            else:
                rank_zero_info(
                    "ExpertLoadMonitor begins to count from scratch: sources or `position_boundaries` have changed"
                )
        if trainer.is_global_zero:
            self._file.start(trainer.global_step, self._logged_at)
            if trainer.global_step == 0 and self._base_rows:
                self._file.append(self._base_rows)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Expect the batch's forward pass."""
        self._expect("train", batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """End the batch's forward pass; what other callbacks may generate or evaluate later is not training."""
        self._close_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where a step ended that is a multiple of ``every_n_steps``."""
        self._close_batch()
        step = trainer.global_step
        # Micro-batches of the next step still see this step's number.
        if step % self.every_n_steps == 0 and step > self._logged_at:
            is_drawn = self._drawn_at is None or step - self._drawn_at >= self.figure_every_n_steps
            self._close_window(trainer, is_drawn)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what came after the last log."""
        if trainer.global_step > self._logged_at:
            self._close_window(trainer, is_drawn=True)
        self._observation.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count a pass of its own."""
        if self._is_fitting():
            self._windows["val"].clear()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Expect the batch's forward pass."""
        if self._is_fitting():
            self._expect("val", batch)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """End the batch's forward pass."""
        self._close_batch()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the pass; of the check before training, keep the routing to compare with."""
        if self._is_fitting() and trainer.sanity_checking:
            window = self._windows["val"]
            sums = window.sum_up(trainer)
            self._base_rows = list(_rows(0, "base", window, sums))
            self._base_entropy = _entropies(window, sums)
        elif self._is_fitting():
            self._log(trainer, "val", is_drawn=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        self._observation.close()
        self._open = self._trainer = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Return the open window of all ranks, and the first shares; Lightning calls this on every rank, as it must."""
        if not self._windows or self._restored is not None:
            return self._restored or {}
        if self._trainer is not None:
            self._windows["train"].sum_up(self._trainer)
        return {
            "window": self._windows["train"].state_dict(),
            "logged_at": self._logged_at,
            "base_shares": self._base_shares_LE,
            "base_entropy": self._base_entropy,
            "starving": self._starving.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, once training starts."""
        self._restored = state_dict

    def _is_fitting(self) -> bool:
        """Return whether a validation is one of a run, unlike `mixcn validate`."""
        return self._trainer is not None

    def _expect(self, stage: str, batch: Any) -> None:
        self._open = self._windows[stage]
        self._open.open_batch(batch)

    def _close_batch(self) -> None:
        if self._open is not None:
            self._open.close_batch()
            self._open = None

    def _observe(self, *routing: Any) -> None:
        if self._open is not None:
            self._open.observe(*routing)

    def _close_window(self, trainer: Trainer, is_drawn: bool) -> None:
        """Log the window of training, and open the next one."""
        if is_drawn:
            self._drawn_at = trainer.global_step
        self._log(trainer, "train", is_drawn)
        self._windows["train"].clear()
        self._logged_at = trainer.global_step

    def _log(self, trainer: Trainer, stage: str, is_drawn: bool) -> None:
        """Sum up the window of a stage on all ranks; write it on rank zero."""
        step, window = trainer.global_step, self._windows[stage]
        sums = window.sum_up(trainer)
        overall = sums.of_groups(range(len(sums.counts)))
        shares_LE, is_counted = shares(overall.counts), bool(overall.tokens.min())
        if stage == "train":
            self._judge(step, shares_LE if is_counted else None)
        if not trainer.is_global_zero:
            return
        self._file.append(_rows(step, stage, window, sums))
        if not is_counted:
            return
        by_source = window.by_source(sums)
        shares_of = {name: shares(part.counts) for name, part in by_source.items()}
        by_side = window.by_side(sums)
        tags = self._tags(
            _PREFIX[stage], overall, shares_LE, shares_of, [shares(each.counts) for each in by_side.values()]
        )
        for name, part in (by_source | by_side).items() if self.all_numbers else ():
            tags |= load_tags(f"{_PREFIX[stage]}/{name}", part)
        if window.boundaries:
            for start, part in window.by_position(sums).items():
                tags |= load_tags(f"{_PREFIX[stage]}/position_from_{start}", part)
        if not self.all_numbers:
            tags = {tag: tags[tag] for tag in tags if tag.endswith(FIRST_NUMBERS) or "/layer_" in tag}
        when = f"{_STAGES[stage]}, step {step}"
        for logger in trainer.loggers:
            # Lightning's own numbers of this step are logged under the one before: it counts them from 0.
            logger.log_metrics(tags, step=max(step - 1, 0))
        if is_drawn:
            panels = {"all": shares_LE} | (shares_of if len(shares_of) > 1 else {})
            figures = {f"{_PREFIX[stage]}/load": load_figure(panels, when)}
            if stage == "val":  # of the same text each time, so that lines differ by the model alone
                lines = entropy_figure(self._base_entropy, _entropies(window, sums), when)
                # TensorBoard shows nothing of a figure that has the tag of a number.
                figures[f"{_PREFIX[stage]}/routing_entropy_by_layer"] = lines
            log_figures(trainer, figures, step)

    def _judge(self, step: int, shares_LE: Tensor | None) -> None:
        """Keep the run's first shares, and warn of starving experts, or of no token at all."""
        if shares_LE is None:
            rank_zero_warn(
                f"ExpertLoadMonitor counted no token up to step {step}: no router saw as many as the batch has. "
                "Give the model whole batches in `training_step`"
            )
            return
        if self._base_shares_LE is None:
            self._base_shares_LE = shares_LE
        if starving := self._starving.update(shares_LE, step - self._logged_at):
            rank_zero_warn(self._starving.warning(starving))

    def _tags(
        self,
        prefix: str,
        overall: LoadSums,
        shares_LE: Tensor,
        shares_of: dict[str, Tensor],
        shares_of_sides: list[Tensor],
    ) -> dict[str, float]:
        """Return the numbers of all tokens, and how sources, sides and time move the shares."""
        tags = load_tags(prefix, overall)
        if self.per_layer:
            tags |= layer_tags(prefix, overall)
        pairs = {"source_divergence_bits": list(shares_of.values()) if len(shares_of) > 1 else []}
        pairs["side_divergence_bits"] = shares_of_sides if len(shares_of_sides) > 1 else []
        pairs["drift_bits"] = [] if self._base_shares_LE is None else [self._base_shares_LE, shares_LE]
        for name, tables in pairs.items():
            if tables:
                bits_L = jensen_shannon_bits(torch.stack(tables))
                tags |= divergence_tags(prefix, name, bits_L, self.per_layer)
        return tags


def _entropies(window: LoadWindow, sums: LoadSums) -> dict[str, Tensor]:
    """Return the routing entropy of each source, or of all tokens where sources have no names, ``[L]``."""
    parts = window.by_source(sums) or {"all": sums.of_groups(range(len(sums.counts)))}
    return {name: part.numbers()["routing_entropy"] for name, part in parts.items() if int(part.tokens.min())}


def _rows(step: int, stage: str, window: LoadWindow, sums: LoadSums) -> Iterator[ExpertLoadRow]:
    names, starts = window.names(), window.bucket_starts()
    for group, counts_LE in enumerate(sums.counts[:-1].tolist()):
        bucket = group % window.num_buckets
        for layer, counts_E in enumerate(counts_LE):
            for expert, tokens in enumerate(counts_E):
                yield ExpertLoadRow(step, stage, names[group], starts[bucket], layer, expert, tokens)

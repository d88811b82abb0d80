"""Average what trains over the steps of a run: its own validation, and its own adapter folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from lightning_mixcn.arguments import MOST_STEPS, Between, Name, check_arguments
from lightning_mixcn.files.schema import MAPPING, record
from lightning_mixcn.metrics import Likelihood
from lightning_mixcn.model.experts.observe import unobserved
from lightning_mixcn.model.sharding import copy_to_shard, full_tensor, local_shard
from lightning_mixcn.modules.causal_lm import SourceEvaluation
from lightning_mixcn.modules.checkpoint_schema import COUNT, require_state, tensor_of

from .adapter_checkpoint import AdapterFolder
from .host import causal_lm, plain_name


class AdapterAverage(Callback):
    """Averages what trains over steps, and writes ``adapter_average/`` beside ``adapter/``.

    The run itself is not changed. Every validation also evaluates the average, batch by batch, under
    ``val_average/<source>/…``. `mixcn export` and `mixcn chat` take the folder as any adapter. The average is float32;
    a rank has its own shard, and there is no copy of the base. torch's AveragedModel and Lightning's WeightAveraging
    copy the whole model, 4-bit base included, and do not shard; their arithmetic (`torch.optim.swa_utils`) is used.

    Args:
        decay: Weight of the average in each step's exponential moving average, which begins at the values of step
            ``start``; null is the mean of the values after each step from ``start`` on, all with the same weight
            (stochastic weight averaging, arXiv 1803.05407).
        start: Optimizer step after which the first values are taken. For the mean of the last N steps of a run give the
            run's steps − N + 1.
        folder: Name of the folder inside ``trainer.default_root_dir``.
    """

    def __init__(
        self,
        decay: Annotated[float, Between(0, 1, excluded=(0, 1))] | None = 0.999,
        start: Annotated[int, Between(1, MOST_STEPS)] = 1,
        folder: Name = "adapter_average",
    ) -> None:
        check_arguments(AdapterAverage, locals())
        self.decay, self.start = decay, start
        self.folder = plain_name("folder", folder)
        self.run_files = (folder,)
        make: Any = get_swa_multi_avg_fn if decay is None else partial(get_ema_multi_avg_fn, decay)  # untyped in torch
        self._update = make()
        self._writer = AdapterFolder(None)
        self._averages: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._steps = 0  # in the average
        self._averaged_at = 0
        self._written_at: int | None = None
        self._restored: dict[str, Any] | None = None
        self._evaluation: SourceEvaluation | None = None
        self._measured: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module."""
        causal_lm(self, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what trains."""
        self._parameters = {name: value for name, value in pl_module.named_parameters() if value.requires_grad}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the average of a checkpoint, or begin without one."""
        self._averages, self._steps, self._averaged_at = {}, 0, trainer.global_step
        if (state := self._restored) is None:
            return
        self._restored = None
        require_state(self, state, record({"steps": COUNT, "measured": MAPPING, "averages": MAPPING}))
        self._steps, self._measured = state["steps"], state["measured"]
        if state["averages"]:
            shapes = {name: tensor_of(value.shape) for name, value in self._parameters.items()}
            require_state(self, state["averages"], record(shapes))
            for name, value in self._parameters.items():
                self._averages[name] = value.detach().float().clone()
                copy_to_shard(self._averages[name], state["averages"][name])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the values of a step that has just been done."""
        # Micro-batches of the next step still see this step's number.
        if trainer.global_step == self._averaged_at or trainer.global_step < self.start:
            return
        self._averaged_at = trainer.global_step
        if not self._averages:
            self._averages = {name: value.detach().float().clone() for name, value in self._parameters.items()}
        else:
            with torch.no_grad():
                mine = [local_shard(average)[0] for average in self._averages.values()]
                present = [local_shard(value)[0].float() for value in self._parameters.values()]
                self._update(mine, present, self._steps)
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the average of all ranks; Lightning calls this on every rank, as it must."""
        if self._restored is not None:
            return self._restored
        averages = {name: full_tensor(value).cpu() for name, value in self._averages.items()}
        return {"steps": self._steps, "measured": self._measured, "averages": averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, once training starts."""
        self._restored = state_dict

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the sums of the average, if there is one."""
        self._evaluation = None
        if self._averages and trainer.state.fn == "fit":
            self._evaluation = SourceEvaluation("val", trainer, pl_module.device, prefix="val_average")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Evaluate the average on the batch, too."""
        if self._evaluation is not None:
            labels = causal_lm(self, pl_module).labels_of_likelihood(batch)
            with self._in_place(pl_module), unobserved():
                self._evaluation.update(pl_module(batch).nll, batch | {"labels": labels})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log each source's likelihood under the average."""
        if self._evaluation is not None:
            results: dict[str, Likelihood] = self._evaluation.finish()
            self._measured = {"step": trainer.global_step, "sources": {name: dict(of) for name, of in results.items()}}
            pl_module.log_dict(self._evaluation.tags(results), sync_dist=True, batch_size=1)
            self._evaluation = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the average of this step."""
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the average of the last step."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._averages and self._written_at != trainer.global_step:
            self._written_at = trainer.global_step
            with self._in_place(pl_module):
                self._writer.write(trainer, causal_lm(self, pl_module), self.folder, self._measured)

    @contextmanager
    def _in_place(self, module: nn.Module) -> Iterator[None]:
        """Have the model compute with the average; afterwards its own values are there, bit for bit."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    def _swap(self, module: nn.Module) -> None:
        """Exchange values and average; one tensor at a time is held twice."""
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # what was gathered of the other values
        # In inference mode, where validation is, the tensors' versions would not say that they have changed.
        with torch.inference_mode(False), torch.no_grad():
            for name, average in self._averages.items():
                mine, other = local_shard(self._parameters[name])[0], local_shard(average)[0]
                values = mine.clone()
                mine.copy_(other)
                other.copy_(values)

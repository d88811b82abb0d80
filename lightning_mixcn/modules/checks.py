"""Check what a run is made of, before and while it trains: optimizer, data, loss; each error says the remedy."""

import math
from collections.abc import Callable
from typing import Any

from bitsandbytes.optim.optimizer import Optimizer8bit
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_mixcn.errors import NonFiniteError, UserError, one_line
from lightning_mixcn.model.batch import check_batch, complete_batch

LARGEST_RATE = 1000
_LARGEST_OPTION = 1_000_000
_UNBOUNDED = ("growth_rate",)  # of Prodigy and D-Adaptation, whose default is infinity


def make_optimizer(maker: Callable[[Any], Optimizer], parameters: list[Any]) -> Optimizer:
    """Make the optimizer; what it refuses is one line.

    Args:
        maker: Function of parameters, as `model.init_args.optimizer` is one.
        parameters: Parameters to optimize, or groups of them.

    Raises:
        ValueError: the optimizer refuses one of its arguments, or takes one that is not finite.
    """
    try:
        optimizer = maker(parameters)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"`model.init_args.optimizer` cannot be made: {one_line(error)}") from error
    for group in optimizer.param_groups:
        for name, value in group.items():
            if isinstance(value, float) and name not in ("lr", *_UNBOUNDED) and not abs(value) <= _LARGEST_OPTION:
                raise UserError(
                    f"`model.init_args.optimizer`: `{name}={value}`, expected a finite number, "
                    f"at most {_LARGEST_OPTION:,}"
                )
        rate = group.get("lr")
        if rate is not None and not 0 <= rate <= LARGEST_RATE:
            raise UserError(f"`model.init_args.optimizer`: `lr={rate}`, expected at least 0 and at most {LARGEST_RATE}")
    return optimizer


def make_scheduler(maker: Callable[[Optimizer], Any], optimizer: Optimizer) -> Any:
    """Make the schedule of an optimizer; what it refuses is one line. Args and errors as of `make_optimizer`."""
    try:
        return maker(optimizer)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"`model.init_args.lr_scheduler` cannot be made: {one_line(error)}") from error


def check_vocabulary(trainer: Any, model: nn.Module | None) -> None:
    """Refuse a tokenizer with more pieces than the model has embeddings.

    Args:
        trainer: Lightning's trainer; data without a tokenizer of ours are not checked here, see `check_batch`.
        model: A transformers model or the PeftModel around it.

    Raises:
        ValueError: the tokenizer is too large.
    """
    tokenizer: Any = getattr(trainer.datamodule, "tokenizer", None)
    if not hasattr(tokenizer, "path") or model is None:  # one of transformers' does not count its added pieces
        return
    embeddings = model.get_input_embeddings().num_embeddings  # type: ignore[operator]  # a method of transformers' models
    if tokenizer.vocab_size > embeddings:
        raise UserError(
            f"`tokenizer`: {tokenizer.path} has {tokenizer.vocab_size} pieces, but the model has {embeddings} "
            "embeddings. Give it as `model.init_args.tokenizer`, with `train_embeddings: true`, or give the data the "
            "base's own tokenizer"
        )


def check_context(trainer: Any, model: nn.Module | None) -> None:
    """Warn of rows that are longer than what the base was trained on.

    Args:
        trainer: Lightning's trainer; data without a `sequence_length` are not checked.
        model: A transformers model or the PeftModel around it.
    """
    length, config = getattr(trainer.datamodule, "sequence_length", None), getattr(model, "config", None)
    if length is None or config is None:
        return
    limits = {
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "sliding_window": getattr(config, "sliding_window", None),
    }
    exceeded = [f"{name} of {limit}" for name, limit in limits.items() if limit is not None and length > limit]
    if exceeded:
        rank_zero_warn(
            f"`data.init_args.sequence_length={length}` exceeds the base's {' and '.join(exceeded)} tokens: it has "
            "never seen such distances. Shorten the rows, unless the run is meant to extend the context"
        )


def check_trains(parameters: list[Any]) -> None:
    """Refuse to train nothing. Args: parameters: What trains. Raises: ValueError if there are none."""
    if not parameters:
        raise UserError(
            "Nothing trains: `lora` is null and `train_embeddings` is false. "
            "Set model.init_args.lora, e.g. {r: 64, lora_alpha: 128, target_modules: all-linear}"
        )


def check_schedule_is_stepped(trainer: Any) -> None:
    """Refuse a schedule that follows a value where it would not be stepped after each validation.

    Args:
        trainer: Lightning's trainer, its loaders set up.

    Raises:
        ValueError: it would be stepped at the end of an epoch, and a stream's epoch has no end; or validations come
            between two optimizer steps, where Lightning steps no schedule.
    """
    accumulated = trainer.accumulate_grad_batches
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.interval == "step" and config.frequency % accumulated:
            multiple = -(-config.frequency // accumulated) * accumulated
            raise UserError(
                f"`trainer.val_check_interval={config.frequency}` validates between optimizer steps "
                f"(`trainer.accumulate_grad_batches={accumulated}`), where Lightning does not step an `lr_scheduler` "
                "that follows a value. Set `trainer.val_check_interval` to a multiple of "
                f"`trainer.accumulate_grad_batches`, e.g. {multiple}"
            )
    waits = any(config.reduce_on_plateau and config.interval == "epoch" for config in trainer.lr_scheduler_configs)
    if waits and math.isinf(trainer.num_training_batches):
        raise UserError(
            "`lr_scheduler`: one that follows a value is stepped after each validation, and there is none. Set "
            "`trainer.val_check_interval` to a number of micro-batches"
        )


def check_labels(step: int, count: float) -> None:
    """Stop before an update that nothing is learned from. Raises: ValueError.

    Args:
        step: Number of the step, from 0.
        count: Divisor of its loss.
    """
    if count <= 0:
        raise UserError(f"Optimizer step {step} holds no token with a label. Check the data's labels (-100 is ignored)")


def check_finite_step(step: int, what: str, value: float, trainer: Any) -> None:
    """Stop before the update when a number is not finite.

    Args:
        step: Optimizer steps done, which is the number of the present one from 0.
        what: Name of the number, such as loss.
        value: Value of the number.
        trainer: Lightning's trainer.

    Raises:
        FloatingPointError: says the step, the last checkpoint and what to do.
    """
    if math.isfinite(value):
        return
    saved = [callback.best_model_path for callback in trainer.checkpoint_callbacks if callback.best_model_path]
    resume = f"Resume from the last checkpoint, {saved[-1]}," if saved else "There is no checkpoint yet: start again"
    raise NonFiniteError(
        f"The {what} of optimizer step {step} (from 0) is {value}; nothing was updated in this step. {resume} "
        "with a lower learning rate or `trainer.gradient_clip_val: 1.0`, or look for broken text in the "
        "data (`data.init_args.sources`)"
    )


ONLY_SOURCE = "all"  # name of all text of a data module that names no sources


def source_names(trainer: Any, stage: str) -> list[str]:
    """Return the names of the sources, in the order of `source_ids`; a data module that names none has one, ``all``.

    Args:
        trainer: Lightning's trainer.
        stage: ``train``, ``val``, ``test`` or ``predict``.
    """
    names = getattr(trainer.datamodule, "source_names", None)
    return [ONLY_SOURCE] if names is None else list(names(stage))


class _BatchContract(Callback):
    """Checks the first batch of each loader, and completes every batch before callbacks and module see it."""

    def __init__(self) -> None:
        self._checked = set[str]()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the loaders of a run before."""
        self._checked.clear()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._take(trainer, pl_module, batch, "train")

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._take(trainer, pl_module, batch, "val")

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._take(trainer, pl_module, batch, "test")

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._take(trainer, pl_module, batch, "predict")

    def _take(self, trainer: Any, module: Any, batch: Any, stage: str) -> None:
        if stage not in self._checked:
            data, sources = trainer.datamodule, len(source_names(trainer, stage))
            embeddings = None if module.model is None else module.model.get_input_embeddings()
            check_batch(
                batch,
                what=f"The first {stage} batch" + ("" if data is None else f" of {type(data).__name__}"),
                required=[
                    *module.batch_keys,
                    *(["source_ids"] if sources > 1 else []),
                    *(["document_index"] if stage == "predict" else []),
                ],
                pieces=getattr(embeddings, "num_embeddings", None),
                sources=sources,
                device=module.device,
            )
            self._checked.add(stage)
        complete_batch(batch, is_scored=stage != "train")


def watch_batches(trainer: Any) -> None:
    """Have the batches of a run checked and completed, before any other callback sees them.

    Lightning's hooks for batches would be those of a data module alone where it has its own.

    Args:
        trainer: Lightning's trainer, whose callbacks are set up.
    """
    if not any(isinstance(callback, _BatchContract) for callback in trainer.callbacks):
        trainer.callbacks = [_BatchContract(), *trainer.callbacks]


def check_optimizer(optimizer: Optimizer, strategy: Strategy) -> None:
    """Refuse bitsandbytes' optimizers where FSDP2 shards what trains.

    Their kernels know no DTensor: the first step fails on the CPU and corrupts memory on CUDA (bitsandbytes, issue
    1633).

    Args:
        optimizer: Optimizer of the parameters that train.
        strategy: Lightning's strategy.

    Raises:
        ValueError: says what to use instead.
    """
    # The base class of all of bitsandbytes' optimizers, those with 32-bit states too.
    if isinstance(optimizer, Optimizer8bit) and isinstance(strategy, ModelParallelStrategy):
        raise UserError(
            f"`model.init_args.optimizer`: bitsandbytes' {type(optimizer).__name__} cannot hold states of parameters "
            f"that {type(strategy).__name__} shards. Use torch.optim.AdamW, whose states are sharded with them, or "
            "one GPU or DDP (`trainer.strategy: auto` or configs/trainer/ddp.yaml)"
        )

"""Check a run before and while it trains; each error says the remedy."""

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from bitsandbytes.optim.optimizer import Optimizer8bit
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_mixcn.arguments import MOST_STEPS, Between, Filled, Name, Seed, check_arguments
from lightning_mixcn.errors import NonFiniteError, UserError, one_line

# Under `bf16-mixed` the module switches autocast off, so it computes exactly what `32-true` does.
_PRECISIONS = ("32-true", "bf16-mixed")

_Some = Annotated[int, Between(0, 10**12)]
_Batches = _Some | Annotated[float, Between(0, 1)]
LARGEST_RATE = 1000
_LARGEST_OPTION = 1_000_000
_UNBOUNDED = ("growth_rate",)  # of Prodigy and D-Adaptation, whose default is infinity


class TrainerValues(TypedDict, total=False):
    """Bounds of the Trainer's values, of which Lightning takes negative ones, NaN, or what never ends."""

    accumulate_grad_batches: Annotated[int, Between(1, 10**6)]
    gradient_clip_val: Annotated[float, Between(0, 10**9, "(null or 0 for no clipping)")] | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    max_steps: Annotated[int, Between(-1, MOST_STEPS)]
    min_steps: Annotated[int, Between(0, MOST_STEPS)] | None
    max_epochs: Annotated[int, Between(-1, 10**6)] | None
    min_epochs: Annotated[int, Between(0, 10**6)] | None
    limit_train_batches: _Batches | None
    limit_val_batches: _Batches | None
    limit_test_batches: _Batches | None
    limit_predict_batches: _Batches | None
    overfit_batches: _Batches
    val_check_interval: (
        Annotated[int, Between(1, 10**12)]
        | Annotated[float, Between(0, 1, excluded=(0,))]
        | Name
        | Annotated[dict[str, _Some], Filled("a time such as {minutes: 30}")]
        | timedelta
        | None
    )
    check_val_every_n_epoch: Annotated[int, Between(1, 10**6)] | None
    log_every_n_steps: Annotated[int, Between(0, MOST_STEPS)] | None


class TrainerArguments(TrainerValues, total=False):
    """Further arguments of the Trainer, which keeps them under other names or in another form."""

    num_sanity_val_steps: Annotated[int, Between(-1, 10**6)] | None
    fast_dev_run: bool | _Some
    num_nodes: Annotated[int, Between(1, 10**5)]
    devices: Annotated[int, Between(-1, 4096)] | Name | list[int]
    reload_dataloaders_every_n_epochs: Annotated[int, Between(0, 10**6)]
    default_root_dir: Name | Path | None
    use_distributed_sampler: bool
    inference_mode: bool
    detect_anomaly: bool
    barebones: bool
    sync_batchnorm: bool


class RunSettings(TypedDict, total=False):
    """Further keys of a configuration."""

    seed_everything: bool | Seed
    ckpt_path: Name | None
    plan: bool
    overwrite: bool


def check_trainer(trainer: Any) -> None:
    """Refuse values of the Trainer that the module could only be wrong with, however it was made.

    Args:
        trainer: Lightning's trainer.

    Raises:
        ValueError: a negative or infinite value, NaN, or another kind of value.
    """
    known = {name: getattr(trainer, name) for name in TrainerValues.__annotations__ if hasattr(trainer, name)}
    algorithm = known.pop("gradient_clip_algorithm", None)
    known["gradient_clip_algorithm"] = getattr(algorithm, "value", algorithm)  # Lightning makes an enum of it
    check_arguments(TrainerValues, known, "trainer.")


def make_optimizer(maker: Callable[[Any], Optimizer], parameters: list[Any]) -> Optimizer:
    """Make the optimizer; what it refuses is one line.

    Args:
        maker: Function of parameters, as `model.init_args.optimizer` is one.
        parameters: Parameters to optimize.

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


def check_precision(precision: str) -> None:
    """Refuse a precision that changes what the model itself decides.

    Args:
        precision: Lightning's name of the precision, `trainer.precision`.

    Raises:
        ValueError: anything but ``32-true`` (and ``bf16-mixed``, which changes nothing here).
    """
    if precision not in _PRECISIONS:
        raise UserError(
            f"`trainer.precision={precision!r}` would cast LoRA's float32 masters and the quantisation scales, or "
            "scale the loss for nothing. Set `trainer.precision: 32-true`; the compute dtype is `model.init_args.dtype`"
        )


def check_vocabulary(trainer: Any, model: nn.Module | None) -> None:
    """Refuse a tokenizer with more pieces than the model has embeddings.

    Args:
        trainer: Lightning's trainer; data without a `tokenizer` is not checked.
        model: A transformers model or the PeftModel around it.

    Raises:
        ValueError: the tokenizer is too large.
    """
    tokenizer = getattr(trainer.datamodule, "tokenizer", None)
    if tokenizer is None or model is None:
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
    """Refuse to train nothing. Args: parameters: Parameters that train. Raises: ValueError if there are none."""
    if not parameters:
        raise UserError(
            "Nothing trains: `lora` is null and `train_embeddings` is false. "
            "Set model.init_args.lora, e.g. {r: 64, lora_alpha: 128, target_modules: all-linear}"
        )


def check_activation_settings(checkpointing: str, memory: int | str | None) -> None:
    """Refuse to choose recomputation twice.

    Args:
        checkpointing: `activation_checkpointing`, of which ``selective`` is the default.
        memory: `activation_memory`.

    Raises:
        ValueError: both are given.
    """
    if memory is None:
        return
    if checkpointing != "selective":
        raise UserError(
            f"`activation_memory={memory!r}` chooses between selective and full for each layer, but "
            f"`activation_checkpointing={checkpointing!r}` is given beside it. Leave one of them out"
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


def source_names(trainer: Any, stage: str) -> list[str]:
    """Return the names of the sources that are evaluated, in the order of `source_ids`.

    Args:
        trainer: Lightning's trainer, with a data module.
        stage: ``val``, ``test`` or ``predict``.

    Raises:
        ValueError: the data module does not name its sources.
    """
    names = getattr(trainer.datamodule, "source_names", None)
    if names is None:
        raise UserError(
            f"{type(trainer.datamodule).__name__} has no `source_names(stage)`, which names the sources that "
            "`source_ids` counts. Use PretrainDataModule, or give your data module this method"
        )
    return list(names(stage))


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

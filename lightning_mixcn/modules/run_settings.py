"""Settings of a run, compared with what they may be before anything is made of them."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from lightning_mixcn.arguments import MOST_STEPS, Between, Filled, Name, Seed, check_arguments
from lightning_mixcn.errors import UserError

# Under `bf16-mixed` the module switches autocast off, so it computes exactly what `32-true` does.
_PRECISIONS = ("32-true", "bf16-mixed")

_Some = Annotated[int, Between(0, 10**12)]
_Time = Annotated[dict[str, _Some], Filled("a time such as {minutes: 30}")]
_Batches = _Some | Annotated[float, Between(0, 1)]


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
        | _Time
        | timedelta
        | None
    )
    check_val_every_n_epoch: Annotated[int, Between(1, 10**6)] | None
    log_every_n_steps: Annotated[int, Between(0, MOST_STEPS)] | None


class TrainerArguments(TrainerValues, total=False):
    """Further arguments of the Trainer, which keeps them under other names or in another form."""

    num_sanity_val_steps: Annotated[int, Between(-1, 10**6)] | None
    max_time: Name | _Time | timedelta | None
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

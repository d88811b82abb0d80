"""Learning rates by part of the model: parameter groups, and multipliers of the optimizer's learning rate."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from lightning.pytorch.cli import LRSchedulerTypeUnion
from torch import Tensor
from torch.optim import Optimizer

from lightning_mixcn.arguments import Between, Filled
from lightning_mixcn.errors import UserError

from .checks import LARGEST_RATE, make_optimizer, make_scheduler

# What a tensor may belong to: a place in the model, and a factor of LoRA.
Part = Literal["embeddings", "attention", "router", "experts", "lora_A", "lora_B"]
LearningRates = Annotated[
    dict[Part, Annotated[float, Between(0, 1000, excluded=(0,))]], Filled("a multiplier of at least one part")
]

# By place: parts of the names of parameters.
_PLACES = {
    "embeddings": {"embed_tokens", "lm_head"},
    "attention": {"self_attn"},
    "router": {"gate"},
    "experts": {"experts"},
    "other": set[str](),  # what a subclass trains besides
}
# The order of the groups, which must not change: checkpoints count parameters by it.
_GROUPS = [f"{place}{factor}" for place in _PLACES for factor in ("", ".lora_A", ".lora_B")]


def group_of(name: str) -> str:
    """Return the name of a parameter's group: its place, and its factor of LoRA.

    >>> group_of("model.layers.0.mlp.experts.gate_proj.lora_B.default.weight")
    'experts.lora_B'
    >>> group_of("model.embed_tokens.weight")
    'embeddings'
    """
    parts = set(name.split("."))
    place = next((place for place, modules in _PLACES.items() if parts & modules), "other")
    return ".".join([place, *sorted(parts & {"lora_A", "lora_B"})])


def make_rated_optimizer(
    maker: Callable[[Any], Optimizer],
    trained: Iterable[tuple[str, Tensor]],
    learning_rates: Mapping[Part, float] | None,
) -> Optimizer:
    """Make the optimizer of what trains, with a learning rate for each part of it.

    Args:
        maker: Function of parameters or parameter groups, as `model.init_args.optimizer` is one.
        trained: Names and parameters.
        learning_rates: Multipliers by part. A tensor's learning rate is the optimizer's times the multipliers of its
            place and of its factor. Null makes one group without a name.

    Returns:
        The optimizer. Given multipliers, its groups are the same for any of them, so that a run can be resumed with
        others.

    Raises:
        ValueError: see `make_optimizer`; the optimizer has no learning rate or makes other groups, a multiplier
            belongs to nothing that trains, or a learning rate is too large.
    """
    if learning_rates is None:
        return make_optimizer(maker, [parameter for _, parameter in trained])
    of_groups: dict[str, list[Tensor]] = {}
    for name, parameter in trained:
        of_groups.setdefault(group_of(name), []).append(parameter)
    names = sorted(of_groups, key=_GROUPS.index)
    used = {part for name in names for part in name.split(".")}
    if unused := [part for part in learning_rates if part not in used]:
        raise UserError(
            f"`learning_rates`: {', '.join(unused)} trains nothing here. Leave it out, or have it trained by "
            f"`lora.target_modules` or `train_embeddings`; what trains is {', '.join(names)}"
        )
    optimizer = make_optimizer(maker, [{"params": of_groups[name], "name": name} for name in names])
    if [group.get("name") for group in optimizer.param_groups] != names or None in _rates(optimizer):
        raise UserError(
            f"`learning_rates`: {type(optimizer).__name__} keeps no groups of parameters with an `lr` each. Use "
            "torch.optim.AdamW, or leave out `learning_rates`"
        )
    for group in optimizer.param_groups:
        # Not in place: a rate that is a tensor is one tensor for all groups.
        group["lr"] = group["lr"] * math.prod(learning_rates.get(part, 1) for part in group["name"].split("."))
        if group["lr"] > LARGEST_RATE:
            raise UserError(
                f"`learning_rates`: {group['name']} would train at {float(group['lr']):g}, expected at most "
                f"{LARGEST_RATE}. Lower its multipliers, or the optimizer's `lr`"
            )
    return optimizer


def make_rated_schedule(
    maker: Callable[[Optimizer], LRSchedulerTypeUnion],
    optimizer: Optimizer,
    learning_rates: Mapping[Part, float] | None,
) -> LRSchedulerTypeUnion:
    """Make the schedule of an optimizer of `make_rated_optimizer`, which must keep the multipliers.

    Raises:
        ValueError: see `make_scheduler`; the schedule has a peak of its own for all groups, as OneCycleLR has.
    """
    peaks = _rates(optimizer)
    schedule: LRSchedulerTypeUnion = make_scheduler(maker, optimizer)
    starts = [group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups]
    if learning_rates and not all(
        math.isclose(start * peaks[0], starts[0] * peak) for start, peak in zip(starts, peaks, strict=True)
    ):
        raise UserError(
            f"`learning_rates`: {type(schedule).__name__} sets learning rates of its own, whatever the optimizer's "
            "are. Use another `lr_scheduler`, such as WarmupCosine, or leave out `learning_rates`"
        )
    return schedule


def stand_in_names() -> list[str]:
    """Return names of a parameter of each group, to try an optimizer on."""
    places = [min(modules) for modules in _PLACES.values() if modules]
    return [".".join(filter(None, pair)) for pair in itertools.product(places, ("", "lora_A", "lora_B"))]


def _rates(optimizer: Optimizer) -> list[Any]:
    return [group.get("lr") for group in optimizer.param_groups]

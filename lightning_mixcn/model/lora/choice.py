"""Which layers and experts have LoRA at all: `train_only`, given in place or as a JSON file with the same object.

An expert that is not chosen has no factors: no gradients, no optimizer states, and no products of its rows with them.
That a language's own experts, in the final layers, can be enough: https://arxiv.org/abs/2605.29714.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

from lightning_mixcn.arguments import Between, Filled, check_arguments
from lightning_mixcn.errors import UserError, did_you_mean
from lightning_mixcn.files.json_object import read_object

_Numbers = list[Annotated[int, Between(0, 10**4)]]
_LAYER = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp\.gate|mlp\.experts)\.")
_KINDS = {"self_attn": "attention", "mlp.gate": "router", "mlp.experts": "experts"}


class TrainOnly(TypedDict, total=False):
    """Parts that have LoRA, of all that `lora` adapts.

    Args:
        layers: Numbers of the layers that train; by default all.
        experts: Numbers of the experts that train, by the number of their layer: a layer that is not named has none. A
            list is these experts of each chosen layer. By default all experts of the chosen layers.
        router: Train the routers of the chosen layers; by default true.
        attention: Train the attention of the chosen layers; by default true.
        about: Facts about the choice, such as the study that made it; nothing depends on them.
    """

    layers: Annotated[_Numbers, Filled("numbers of layers, or leave it out for all")]
    experts: dict[str, Annotated[_Numbers, Filled("numbers of experts, or leave out the layer")]] | _Numbers
    router: bool
    attention: bool
    about: dict[str, Any]


def read_choice(train_only: TrainOnly | str | Path) -> TrainOnly:
    """Return a choice without its `about`, from its file where it is a path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, has an unknown key, or a value of another kind.
    """
    if isinstance(train_only, str | Path):
        file = Path(train_only).expanduser()
        given = read_object(file, remedy="Give `train_only` as a JSON file with such an object, or in place")
    else:
        given = dict(train_only)
    if unknown := sorted(map(str, given.keys() - TrainOnly.__annotations__.keys())):
        known = ", ".join(TrainOnly.__annotations__)
        near = did_you_mean(unknown[0], TrainOnly.__annotations__)
        raise UserError(f"`train_only` has the key {unknown[0]!r}, which is not known{near}. Expected some of {known}")
    if isinstance(experts := given.get("experts"), Mapping):
        given["experts"] = experts = {str(layer): numbers for layer, numbers in experts.items()}  # YAML's are numbers
        for layer in experts:
            if not re.fullmatch("0|[1-9][0-9]{0,3}", layer):
                raise UserError(f"`train_only.experts` has the key {layer!r}. Expected the number of a layer")
    check_arguments(TrainOnly, given, "train_only.")
    lists = {"layers": given.get("layers", [])}
    lists |= {f"experts[{layer!r}]": numbers for layer, numbers in experts.items()} if isinstance(experts, dict) else {}
    lists |= {"experts": experts} if isinstance(experts, list) else {}
    for name, numbers in lists.items():
        if len(set(numbers)) < len(numbers):
            raise UserError(f"`train_only.{name}={numbers}` has a number twice. Give each once")
    given.pop("about", None)
    return cast(TrainOnly, given)


def chosen_groups(
    train_only: TrainOnly | str | Path, groups: Mapping[str, int], adapted: Mapping[str, Any]
) -> dict[str, list[int]]:
    """Choose the groups (experts, or the only one of a module) that have factors.

    Args:
        train_only: The choice.
        groups: Name in memory of every module that can be adapted → number of its groups.
        adapted: Those of them that `lora` adapts.

    Returns:
        Name of each module in `groups` → numbers of its chosen groups, ascending; none where it does not train.

    Raises:
        ValueError: the choice is not for this model, or has nothing of `adapted`.
    """
    choice, places = read_choice(train_only), {name: _place(name) for name in groups}
    depth, width = 1 + max(layer for layer, _ in places.values()), max(groups.values())
    layers = choice.get("layers", list(range(depth)))
    experts = choice.get("experts", list(range(width)))
    by_layer = {int(layer): numbers for layer, numbers in experts.items()} if isinstance(experts, dict) else {}
    _check_range("layers", layers, depth)
    _check_range("experts", by_layer, depth, "layers")
    for numbers in [experts] if isinstance(experts, list) else by_layer.values():
        _check_range("experts", numbers, width)
    if apart := sorted(by_layer.keys() - set(layers)):
        raise UserError(
            f"`train_only.experts` names layer {apart[0]}, which `train_only.layers` leaves out. Add it there"
        )
    by_layer = by_layer if isinstance(experts, dict) else dict.fromkeys(layers, experts)

    def chosen(name: str) -> list[int]:
        layer, kind = places[name]
        if kind == "experts":
            return sorted(by_layer.get(layer, []))
        return [0] if layer in layers and choice.get(kind, True) else []

    kept = {name: chosen(name) for name in groups}
    _check_effect(choice, {places[name] for name in adapted if kept[name]})
    return kept


def _place(name: str) -> tuple[int, str]:
    """Return the layer of a module, and the part of it that `TrainOnly` knows."""
    match = _LAYER.match(name)
    assert match is not None
    return int(match[1]), _KINDS[match[2]]


def _check_range(key: str, numbers: Iterable[int], count: int, kind: str | None = None) -> None:
    for number in numbers:
        if number >= count:
            raise UserError(
                f"`train_only.{key}` has {number}, but the model has {kind or key} 0 to {count - 1}. Make the choice "
                "for this model"
            )


def _check_effect(choice: TrainOnly, trains: set[tuple[int, str]]) -> None:
    """Refuse what would train nothing.

    Args:
        choice: The choice.
        trains: Layers, and parts of them, that train.
    """
    if not trains:
        raise UserError("`train_only` leaves nothing of what `lora` adapts. Choose some of it, or set `lora: null`")
    experts = choice.get("experts", [])
    with_experts = {layer for layer, kind in trains if kind == "experts"}
    missing = [layer for layer in experts if int(layer) not in with_experts] if isinstance(experts, dict) else []
    if missing or (experts and not with_experts):
        where = f"experts of layer {missing[0]}" if missing else "experts"
        raise UserError(
            f"`train_only.experts` chooses {where}, but `lora` adapts none there. Name w1, w2 and w3 in "
            "`lora.target_modules`, or leave them out of the choice"
        )
    if idle := [layer for layer in choice.get("layers", []) if layer not in {layer for layer, _ in trains}]:
        raise UserError(
            f"`train_only.layers` has {idle[0]}, of which nothing trains. Leave it out, or choose experts, router or "
            "attention there"
        )

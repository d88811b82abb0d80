"""Locate a matrix's factors in an adapter that PEFT trained on transformers 5's fused experts.

A wrapped parameter has A ``[E·R, in]``, whose rows are expert-major, and B ``[out, R·E]``, whose columns are rank-major
(``k·E + e``): `peft.tuners.lora.layer.ParamWrapper`. The experts' two parameters are wrapped one around the other, the
inner one (gate_up_proj) under the name ``base_layer``.

Legend: E = experts (1 for the router), R = rank, H = hidden, I = intermediate.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

_FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate|experts\.base_layer|experts)")


class FusedPlace(NamedTuple):
    """The part of a wrapped parameter's factors that belongs to one matrix.

    Args:
        stored: Name in the file, without ``.lora_A.weight``.
        parameter: Name of the wrapped parameter, which patterns in PEFT's configuration match.
        expert: Number of the expert.
        experts: E.
        rank: R.
        half: 0 for the upper half of B's rows (w1 in gate_up_proj), 1 for the lower (w3); ``None`` for all.
    """

    stored: str
    parameter: str
    expert: int
    experts: int
    rank: int
    half: int | None

    def rows_of_b(self, b_OC: Tensor) -> Tensor:
        """Return this matrix's B ``[out, R]`` out of the stored one ``[O, R·E]``."""
        b_OR = b_OC.view(len(b_OC), self.rank, self.experts)[:, :, self.expert]
        return b_OR if self.half is None else b_OR.chunk(2)[self.half]


def fused_places(
    stored: set[str], shape: Callable[[str, str], tuple[int, ...]], config: LoraConfig
) -> Iterator[tuple[str, FusedPlace]]:
    """Yield the name of every matrix that fused factors adapt, and the place of its own.

    Args:
        stored: Names in the file.
        shape: Name in the file, and ``A`` or ``B`` → shape of that factor.
        config: PEFT's, for the ranks and the names of the parameters.

    Raises:
        ValueError: the rows are not a multiple of the rank, or it cannot be told which parameter factors wrap.
    """
    sizes: dict[str, int] = {}
    for name in sorted(stored):
        match = _FUSED.fullmatch(name)
        if match is None:
            continue
        layer, kind = match.groups()
        parameter = _parameter(layer, kind, stored, config)
        ranks: Mapping[str, int] = config.rank_pattern or {}
        rank = ranks.get(get_pattern_key(list(ranks), parameter), config.r)
        rows, _ = shape(name, "A")
        experts, rest = divmod(rows, rank)
        if rest or not experts:
            raise ValueError(f"{name}.lora_A has {rows} rows, expected a multiple of its rank {rank}")
        if kind == "gate":
            yield f"{layer}.block_sparse_moe.gate", FusedPlace(name, parameter, 0, experts, rank, None)
            continue
        _check_sizes(sizes, name, parameter, (experts, shape(name, "B")[0], shape(name, "A")[1]))
        halves = {"w1": 0, "w3": 1} if parameter.endswith("gate_up_proj") else {"w2": None}
        for expert in range(experts):
            for leaf, half in halves.items():
                matrix = f"{layer}.block_sparse_moe.experts.{expert}.{leaf}"
                yield matrix, FusedPlace(name, parameter, expert, experts, rank, half)


def _check_sizes(sizes: dict[str, int], name: str, parameter: str, found: tuple[int, int, int]) -> None:
    """Check that E, I and H are those of the factors before, so that none is taken for the other parameter's."""
    experts, out, width = found
    is_gate_up = parameter.endswith("gate_up_proj")
    here = {"E": experts, "I": out // 2 if is_gate_up else width, "H": width if is_gate_up else out}
    for size, value in here.items():
        if sizes.setdefault(size, value) != value:
            raise ValueError(
                f"{name} has factors of {parameter.rpartition('.')[2]} with {size} = {value}, elsewhere {sizes[size]}. "
                "Do target_parameters and rank_pattern belong to these tensors?"
            )


def _parameter(layer: str, kind: str, stored: set[str], config: LoraConfig) -> str:
    """Name the parameter that factors wrap; where a layer has one wrapped, `target_parameters` say which.

    PEFT wraps the two in the model's order, gate_up_proj first, and matches a target with the end of a name.
    """
    if kind == "gate":
        return f"{layer}.mlp.gate.weight"
    gate_up, down = (f"{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    if kind == "experts.base_layer":
        return gate_up
    if f"{layer}.mlp.experts.base_layer" in stored:
        return down
    targets = [str(target) for target in config.target_parameters or ()]
    named = [name for name in (gate_up, down) if any(f".{name}".endswith(f".{target}") for target in targets)]
    if len(named) != 1:
        raise ValueError(
            f"{layer}.mlp.experts has the factors of one parameter, but target_parameters={targets} name "
            f"{'both' if named else 'none'} of gate_up_proj and down_proj there. Name the one that was trained"
        )
    return named[0]

"""Where a matrix's factors lie in an adapter that PEFT trained on transformers 5's fused experts.

A wrapped parameter has A ``[E·R, in]``, whose rows are expert-major, and B ``[out, R·E]``, whose columns are rank-major
(``k·E + e``): `peft.tuners.lora.layer.ParamWrapper`. The experts' two parameters are wrapped one around the other, the
inner one (gate_up_proj) under the name ``base_layer``.

Legend: E = experts (1 for the router), R = rank, I = intermediate.
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
        """This matrix's B ``[out, R]`` out of the stored one ``[O, R·E]``."""
        b_OR = b_OC.view(len(b_OC), self.rank, self.experts)[:, :, self.expert]
        return b_OR if self.half is None else b_OR.chunk(2)[self.half]


def fused_places(
    stored: set[str], rows_of_a: Callable[[str], int], config: LoraConfig
) -> Iterator[tuple[str, FusedPlace]]:
    """Name of every matrix that fused factors adapt, and where its own are.

    Args:
        stored: Names in the file.
        rows_of_a: Name in the file → rows of its A.
        config: PEFT's, for the ranks.

    Raises:
        ValueError: the rows are not a multiple of the rank.
    """
    for name in sorted(stored):
        match = _FUSED.fullmatch(name)
        if match is None:
            continue
        layer, kind = match.groups()
        parameter = _parameter(layer, kind, stored, config)
        ranks: Mapping[str, int] = config.rank_pattern or {}
        rank = ranks.get(get_pattern_key(list(ranks), parameter), config.r)
        experts, rest = divmod(rows_of_a(name), rank)
        if rest or not experts:
            raise ValueError(f"{name}.lora_A has {rows_of_a(name)} rows, expected a multiple of its rank {rank}")
        if kind == "gate":
            yield f"{layer}.block_sparse_moe.gate", FusedPlace(name, parameter, 0, experts, rank, None)
            continue
        halves = {"w1": 0, "w3": 1} if parameter.endswith("gate_up_proj") else {"w2": None}
        for expert in range(experts):
            for leaf, half in halves.items():
                matrix = f"{layer}.block_sparse_moe.experts.{expert}.{leaf}"
                yield matrix, FusedPlace(name, parameter, expert, experts, rank, half)


def _parameter(layer: str, kind: str, stored: set[str], config: LoraConfig) -> str:
    """The parameter that the factors of this name wrap; a lone one has no ``base_layer`` in its name."""
    if kind == "gate":
        return f"{layer}.mlp.gate.weight"
    targets = [str(target) for target in config.target_parameters or ()]
    alone = f"{layer}.mlp.experts.base_layer" not in stored
    lone_gate_up = alone and any(target.endswith("gate_up_proj") for target in targets)
    inner = kind == "experts.base_layer" or lone_gate_up
    return f"{layer}.mlp.experts.{'gate_up_proj' if inner else 'down_proj'}"

r"""Which matrices a `LoraConfig` adapts, and with which rank and alpha, whichever names it uses.

A matrix has a name in adapter files (``model.layers.0.block_sparse_moe.experts.3.w1`` in one family,
``model.layers.0.mlp.experts.3.gate_proj`` in others), and one in memory (``model.layers.0.mlp.experts.gate_proj``, all
experts of the layer together). Both count, and w1, w3 and w2 count for gate_proj, up_proj and down_proj everywhere.
They are matched as PEFT matches: an entry of a list is a whole name or its end, a string is a regular expression for
the whole name, and a key of a pattern is one for its end, ``(.*\.)?(key)$``, of which the first that matches counts.

What matches nothing is refused, and so is what treats the experts of one projection differently: their factors are
one stack of one rank.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from peft import LoraConfig

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.architectures import Architecture
from lightning_mixcn.model.checkpoints.layout import disk_names

from .adapter_file import PREFIX

ALL_LINEAR = "all-linear"
# Names of an expert's matrices in the paper of the method, which every family understands.
_ALIASES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Adaptation(NamedTuple):
    """Rank and alpha of the factors of a module."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class _Matrix:
    """One matrix.

    Args:
        module: The module in memory that holds it.
        stored: Its name in adapter files.
    """

    module: str
    stored: str

    @cached_property
    def ours(self) -> list[str]:
        """Names in memory; transformers' router has no ``linear`` inside."""
        found = [self.module, *([self.module.removesuffix(".linear")] if self.module.endswith(".linear") else [])]
        experts, is_expert, leaf = self.module.partition(".experts.")
        return [*found, f"{experts}.experts.{_ALIASES[leaf]}"] if is_expert else found

    @cached_property
    def layer(self) -> int:
        return int(self.stored.split(".")[2])

    @property
    def short(self) -> str:
        return self.stored.rpartition(".")[2]


def adapted_modules(
    config: LoraConfig, architecture: Architecture, groups: Mapping[str, int], others: Iterable[str]
) -> dict[str, Adaptation]:
    """Find the modules that a configuration adapts.

    Args:
        config: The configuration as the user gave it.
        architecture: Family of the model.
        groups: Name in memory of every module that can be adapted → number of matrices (experts, or 1).
        others: Names of further modules, which may be excluded, too: ``lm_head`` for instance.

    Returns:
        Name in memory of every adapted module → its rank and alpha.

    Raises:
        ValueError: a name, expression, layer or key matches nothing or has no effect, or experts of one projection
            would differ.
    """
    if not config.target_modules:
        raise UserError(
            f"`lora.target_modules={config.target_modules!r}`: expected a list of "
            f"{', '.join(architecture.short_names)}, a regular expression, or {ALL_LINEAR}"
        )
    names = {name: disk_names(architecture, name, count) for name, count in groups.items()}
    matrices = [_Matrix(name, stored) for name, found in names.items() for stored in found]
    asked = _targeted(config, matrices)
    excluded = _excluded(config, asked, matrices, others)
    targeted = [matrix for matrix in asked if matrix not in excluded]
    if not targeted:
        raise UserError(
            "`lora.exclude_modules` leaves nothing of `lora.target_modules`. Set `lora: null` to adapt none"
        )
    _check_whole_stacks(targeted, groups)
    ranks = _by_pattern("rank_pattern", config.rank_pattern, config.r, targeted, matrices)
    alphas = _by_pattern("alpha_pattern", config.alpha_pattern, config.lora_alpha, targeted, matrices)
    return {matrix.module: Adaptation(ranks[matrix.module], alphas[matrix.module]) for matrix in targeted}


def _targeted(config: LoraConfig, matrices: list[_Matrix]) -> list[_Matrix]:
    targets: Any = config.target_modules
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return matrices
        matching = _matching("target_modules", targets, matrices)
        if not matching:
            raise _matches_nothing("target_modules", targets, matrices)
        return matching
    chosen: set[_Matrix] = set()
    ends = _ends(matrices)
    for target in sorted(targets):
        found = ends.get(target.removeprefix(PREFIX))
        if not found:
            raise _matches_nothing("target_modules", target, matrices)
        # PEFT takes a whole name whatever `layers_to_transform` says.
        is_whole = target.removeprefix(PREFIX) in {name for matrix in found for name in (matrix.stored, *matrix.ours)}
        chosen |= found if is_whole else _in_layers(config, found)
    _check_layers(config, chosen)
    return [matrix for matrix in matrices if matrix in chosen]


def _in_layers(config: LoraConfig, found: set[_Matrix]) -> set[_Matrix]:
    if config.layers_to_transform is None:
        return found
    chosen = _as_list(config.layers_to_transform)
    return {matrix for matrix in found if _index(config, matrix) in chosen}


def _check_layers(config: LoraConfig, chosen: set[_Matrix]) -> None:
    """Check that every layer that the configuration names has something to adapt."""
    if config.layers_to_transform is None:
        return
    layers = _as_list(config.layers_to_transform)
    indices = {_index(config, matrix) for matrix in chosen}
    missing = [layer for layer in layers if layer not in indices]
    if missing or not layers:
        pattern = f" with `layers_pattern={config.layers_pattern!r}`" if config.layers_pattern else ""
        raise UserError(
            f"`lora.layers_to_transform={config.layers_to_transform!r}`{pattern} matches nothing"
            f"{f' for {missing[0]}' if missing else ''}. Give numbers of layers, from 0 on, or leave it out for all"
        )


def _index(config: LoraConfig, matrix: _Matrix) -> int | None:
    """Return the number that `layers_to_transform` counts; PEFT lets `layers_pattern` say which one it is."""
    if not config.layers_pattern:
        return matrix.layer
    for pattern in _as_list(config.layers_pattern):
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", matrix.stored):
            return int(match[1])
    return None


def _excluded(
    config: LoraConfig, targeted: list[_Matrix], matrices: list[_Matrix], others: Iterable[str]
) -> set[_Matrix]:
    excluded: Any = config.exclude_modules
    if not excluded:
        return set()
    if isinstance(excluded, str):
        found = _matching("exclude_modules", excluded, targeted)
        known = [*others, *(name for matrix in matrices for name in (matrix.stored, *matrix.ours))]
        if not found and not _matcher("exclude_modules", excluded)(known):
            raise _matches_nothing("exclude_modules", excluded, matrices)
        return set(found)
    ends = _ends(matrices)
    further = {end for name in others for end in _ends_of(name)}
    for name in sorted(excluded):
        if name.removeprefix(PREFIX) not in ends.keys() | further:
            raise _matches_nothing("exclude_modules", name, matrices)
    return {matrix for name in excluded for matrix in ends.get(name.removeprefix(PREFIX), ())}


def _by_pattern(
    option: str, pattern: Mapping[str, Any] | None, default: Any, targeted: list[_Matrix], matrices: list[_Matrix]
) -> dict[str, Any]:
    """Return for each module the value of the first key that matches it, or the default."""
    values: dict[_Matrix, Any] = {}
    for key, value in (pattern or {}).items():
        found = _matching(option, key, targeted, end=True)
        if not found and _matching(option, key, matrices, end=True):
            raise UserError(
                f"`lora.{option}[{key!r}]` has no effect: `lora` does not adapt it. Leave it out, or adapt it"
            )
        if not found:
            raise _matches_nothing(option, key, matrices)
        fresh = [matrix for matrix in found if matrix not in values]
        if not fresh:
            raise UserError(
                f"`lora.{option}[{key!r}]` has no effect: keys before it match all that it matches, and the first "
                "counts. Put it before them"
            )
        values |= dict.fromkeys(fresh, value)
    by_module: dict[str, dict[Any, list[_Matrix]]] = defaultdict(lambda: defaultdict(list))
    for matrix in targeted:
        by_module[matrix.module][values.get(matrix, default)].append(matrix)
    for differing in by_module.values():
        if len(differing) > 1:
            first = next(iter(differing.values()))[0]
            raise UserError(
                f"`lora.{option}` gives {first.short} of layer {first.layer} {' and '.join(map(str, differing))} by "
                rf"expert, but the experts of a layer share one. Use a key for all of them, e.g. 'layers\.{first.layer}"
                rf"\..*{first.short}'"
            )
    return {module: next(iter(differing)) for module, differing in by_module.items()}


def _check_whole_stacks(targeted: list[_Matrix], groups: Mapping[str, int]) -> None:
    stacks: dict[str, list[_Matrix]] = defaultdict(list)
    for matrix in targeted:
        stacks[matrix.module].append(matrix)
    for module, found in stacks.items():
        if len(found) < groups[module]:
            raise UserError(
                f"`lora.target_modules` (less `exclude_modules`) adapts {found[0].stored} but not {found[0].short} of "
                f"all {groups[module]} experts of the layer, which are adapted together. Name {found[0].short} alone, "
                "and layers with `layers_to_transform`"
            )


def _matching(option: str, expression: str, among: list[_Matrix], *, end: bool = False) -> list[_Matrix]:
    """Return those of some matrices whose whole name, or its end, a regular expression matches."""
    matches = _matcher(option, expression, end=end)
    in_files = {matrix for matrix in among if matches([matrix.stored])}
    in_memory = {matrix for matrix in among if matches(matrix.ours)}
    if in_files:
        _check_same_meaning(option, expression, in_files, in_memory - in_files)
    return [matrix for matrix in among if matrix in in_files or matrix in in_memory]


def _matcher(option: str, expression: str, *, end: bool = False) -> Callable[[Iterable[str]], bool]:
    try:
        compiled = re.compile(rf"(.*\.)?({expression})$" if end else expression)
    except re.error as error:
        raise UserError(
            f"`lora.{option}`: {expression!r} is not a regular expression ({error}). Mend it, or give names"
        ) from error
    return lambda names: any(compiled.fullmatch(whole) for name in names for whole in (name, f"{PREFIX}{name}"))


def _check_same_meaning(option: str, expression: str, in_files: set[_Matrix], further: set[_Matrix]) -> None:
    """Refuse an expression that matches more in our names than in those of files by a wildcard, e.g. ``.*_proj``."""
    for matrix in sorted(further, key=lambda matrix: matrix.stored):
        leaf = matrix.module.rpartition(".")[2]
        if "mlp" not in expression and not all(part in expression for part in leaf.split("_")):
            names = sorted({found.short for found in in_files})
            raise UserError(
                f"`lora.{option}`: {expression!r} matches {', '.join(names)} in the names of adapter files, and also "
                f"{leaf} ({matrix.short}) in those of the model. Spell out the names that you mean"
            )


def _matches_nothing(option: str, name: str, matrices: Sequence[_Matrix]) -> ValueError:
    plain = name.replace("\\", "").removeprefix(PREFIX)
    known = {end for end in _ends(matrices) if end.count(".") == plain.count(".")}
    close = difflib.get_close_matches(plain, sorted(known), n=3)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    whole = " LoRA is for attention, router and experts; `train_embeddings: true` trains embed_tokens and lm_head."
    short_names = dict.fromkeys(matrix.short for matrix in matrices)
    is_embedding = any(part in name for part in ("embed", "lm_head"))
    return UserError(
        f"`lora.{option}` names {name!r}, which matches nothing in this model.{whole if is_embedding else ''} {meant}"
        f"Expected names out of {', '.join(short_names)}, or whole names of an adapter file"
    )


def _ends(matrices: Iterable[_Matrix]) -> dict[str, set[_Matrix]]:
    """Map every name of every matrix, and every end of one after a dot, to the matrices."""
    ends: dict[str, set[_Matrix]] = defaultdict(set)
    for matrix in matrices:
        for name in (matrix.stored, *matrix.ours):
            for end in _ends_of(name):
                ends[end].add(matrix)
    return dict(ends)


def _ends_of(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, int | str) else list(value)

"""Read a PEFT adapter folder, whoever wrote it: its adapted matrices and their factors.

Names are those of the family's files with one matrix an expert (``model.layers.0.mlp.experts.3.gate_proj``), whatever
the layout of the file.

Legend: R rank.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from lightning_mixcn.errors import MissingFileError, UserError, one_line
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.files.safetensors import SafetensorsFile
from lightning_mixcn.files.schema import NULL, TEXT, each, either, record, whole
from lightning_mixcn.model.architectures import Architecture
from lightning_mixcn.model.checkpoints.layout import disk_names

from .options import check_stored_options

_FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate|experts\.base_layer|experts)")


class FusedPlace(NamedTuple):
    """The part of a wrapped parameter's factors that belongs to one matrix.

    Args:
        stored: Name in the file, without ``.lora_A.weight``.
        parameter: Name of the wrapped parameter, which patterns in PEFT's configuration match.
        expert: Number of the expert.
        experts: E.
        rank: R.
        half: 0 for the upper half of B's rows (gate in gate_up_proj), 1 for the lower (up); ``None`` for all.
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
    stored: set[str],
    shape: Callable[[str, str], tuple[int, ...]],
    config: LoraConfig,
    architecture: Architecture,
) -> Iterator[tuple[str, FusedPlace]]:
    """Yield the name of every matrix that fused factors adapt, and the place of its own.

    Args:
        stored: Names in the file.
        shape: Name in the file, and ``A`` or ``B`` → shape of that factor.
        config: PEFT's, for the ranks and the names of the parameters.
        architecture: Family of the base.

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
            raise UserError(f"{name}.lora_A has {rows} rows, expected a multiple of its rank {rank}")
        if kind == "gate":
            yield f"{layer}.{architecture.block}.gate", FusedPlace(name, parameter, 0, experts, rank, None)
            continue
        _check_sizes(sizes, name, parameter, (experts, shape(name, "B")[0], shape(name, "A")[1]))
        halves = {"gate_proj": 0, "up_proj": 1} if parameter.endswith("gate_up_proj") else {"down_proj": None}
        for expert in range(experts):
            for leaf, half in halves.items():
                (matrix,) = disk_names(architecture, f"{layer}.mlp.experts.{leaf}", range(expert, expert + 1))
                yield matrix, FusedPlace(name, parameter, expert, experts, rank, half)


def _check_sizes(sizes: dict[str, int], name: str, parameter: str, found: tuple[int, int, int]) -> None:
    """Check that E, I and H are those of the factors before, so that none is taken for the other parameter's."""
    experts, out, width = found
    is_gate_up = parameter.endswith("gate_up_proj")
    here = {"E": experts, "I": out // 2 if is_gate_up else width, "H": width if is_gate_up else out}
    for size, value in here.items():
        if sizes.setdefault(size, value) != value:
            raise UserError(
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
        raise UserError(
            f"{layer}.mlp.experts has the factors of one parameter, but target_parameters={targets} name "
            f"{'both' if named else 'none'} of gate_up_proj and down_proj there. Name the one that was trained"
        )
    return named[0]


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Key of the weights' metadata. It is there rather than in the configuration, so that it goes with the factors.
START_RANK = "mixcn_start_rank"
_NAMES = either(NULL, TEXT, each(TEXT))
_STRUCTURE = record(
    {},
    {
        "peft_type": TEXT,
        "base_model_name_or_path": either(NULL, TEXT),
        "revision": either(NULL, TEXT),
        "target_modules": _NAMES,
        "exclude_modules": _NAMES,
        "target_parameters": either(NULL, each(TEXT)),
        "layers_pattern": _NAMES,
        "layers_to_transform": either(NULL, whole(0, 1024), each(whole(0, 1024))),
    },
)
EMBEDDINGS = ("model.embed_tokens", "lm_head")

_FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class StoredFactors(NamedTuple):
    """The factors of one matrix as they are stored: it becomes ``W + scaling · B A``.

    Args:
        a: ``[R, in]``.
        b: ``[out, R]``.
        scaling: α/R, or α/√R under rsLoRA.
    """

    a: Tensor
    b: Tensor
    scaling: float


class AdapterFile:
    """A LoRA adapter in a folder, of which headers are read until a matrix is asked for.

    Args:
        path: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or hub id.
        architecture: Family of its base. Without it only the configuration and the saved embeddings can be asked for.

    Attributes:
        name: The folder's path, or the hub id, as it was given.
        folder: The folder.
        config: PEFT's configuration as it is stored.
        names: The adapted matrices, sorted.
        saved: Names of the embeddings that were trained as a whole, out of ``model.embed_tokens`` and ``lm_head``.
        layer_scale: Number of a layer → factor of its updates, where that is not 1; see `scaled_by_layer`.
        is_on_rounded_base: It is a view of `on_rounded_base`.
        start_rank: S > 0 where the adapter started from the rounding error of NF4, see `rounding_start`. Ranks are then
            in runs of S: what was trained on the rounded base, and the start, subtracted, in turns. Together they are
            plain LoRA for the high-precision base.

    Raises:
        FileNotFoundError: no such folder, or not an adapter's.
        ValueError: another method than LoRA, an extension of LoRA, or tensors of no known meaning.
    """

    def __init__(self, path: str | Path, architecture: Architecture | None = None) -> None:
        """Read the configuration and the header."""
        self.name, self.folder, self.architecture = str(path), local_folder(path), architecture
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (self.folder / name).is_file():
                raise MissingFileError(f"`adapter={str(path)!r}` holds no {name}. Give a PEFT adapter folder")
        self.config = self._read_config()
        self._file = SafetensorsFile(self.folder / WEIGHTS_NAME)
        self._is_checked, self.is_on_rounded_base = False, False
        self.layer_scale: dict[int, float] = {}
        text = self._file.metadata.get(START_RANK, "0")
        self.start_rank = int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0
        found: dict[str, set[str]] = {}
        saved = {f"{PREFIX}{name}.weight": name for name in EMBEDDINGS}
        for key in self._file.entries:
            if match := _FACTOR.fullmatch(key):
                found.setdefault(match[1], set()).add(match[2])
            elif key not in saved:
                raise UserError(
                    f"`adapter={str(path)!r}` holds {key}, which is neither a LoRA factor nor embed_tokens or lm_head. "
                    "Give a plain LoRA adapter"
                )
        self._fused = dict(fused_places(set(found), self._shape, self.config, architecture)) if architecture else {}
        in_stacks = {place.stored for place in self._fused.values()}
        # A router's factors may have the same name in both layouts.
        self.names = sorted(found.keys() - in_stacks | self._fused.keys())
        self.saved = [name for key, name in saved.items() if key in self._file.entries]

    def scaled_by_layer(self, factors: Mapping[int, float]) -> Self:
        """Return the adapter with every update of a layer multiplied by its factor; at 0 it adapts that layer no more.

        Args:
            factors: Number of a layer → factor; layers that are not named, and saved embeddings, stay as they are.
        """
        scaled = copy.copy(self)
        scaled.layer_scale = {layer: factor for layer, factor in sorted(factors.items()) if factor != 1}
        scaled.names = [name for name in self.names if scaled._scale(name) != 0]
        return scaled

    def __contains__(self, name: object) -> bool:
        """Tell whether the matrix of this name has both factors."""
        return name in self._fused or all(f"{PREFIX}{name}.lora_{key}.weight" in self._file.entries for key in "AB")

    def on_rounded_base(self) -> "AdapterFile":
        """Return the adapter for the base as NF4 rounds it, on which it was trained: nothing subtracts its start."""
        if not self.start_rank:
            return self
        view = copy.copy(self)
        view.is_on_rounded_base = True
        return view

    def lora_config(self, num_layers: int) -> LoraConfig:
        """Return what adapts the same matrices with the same rank and scaling, to go on training them.

        Args:
            num_layers: Layers of the base.

        Raises:
            ValueError: it adapts no matrix, or matrices have several ranks.
        """
        ranks = sorted({self.rank(name) for name in self.names})
        if len(ranks) != 1:
            raise UserError(
                f"`adapter={self.name!r}` has matrices of the ranks {', '.join(map(str, ranks)) or '(none)'}, expected "
                "one. Give `lora` with `r` and `rank_pattern`, as the adapter was trained"
            )
        layers: dict[str, set[str]] = {}
        for name in self.names:
            layers.setdefault(name.rpartition(".")[2], set()).add(name.removeprefix("model.layers.").partition(".")[0])
        # Whole names where a layer is left out, as adapter files have them.
        partial = {short for short, of_short in layers.items() if len(of_short) < num_layers}
        targets = {name if (short := name.rpartition(".")[2]) in partial else short for name in self.names}
        return LoraConfig(
            r=ranks[0],
            lora_alpha=self.config.lora_alpha,
            use_rslora=self.config.use_rslora,
            lora_dropout=self.config.lora_dropout,
            target_modules=sorted(targets),
        )

    def rank(self, name: str) -> int:
        """Return the rank of the factors of a matrix. ValueError if they do not fit each other."""
        rank = self._stored_rank(name)
        if not self.is_on_rounded_base:
            return rank
        if rank % (2 * self.start_rank):
            raise UserError(
                f"`adapter={self.name!r}`: {name} has the rank {rank}, expected a multiple of 2 x {self.start_rank}, "
                f"since {WEIGHTS_NAME} says {START_RANK}={self.start_rank}. Copy or download the adapter again"
            )
        return rank // 2

    def _stored_rank(self, name: str) -> int:
        place = self._fused.get(name)
        a, b = (self._shape(place.stored if place else name, factor) for factor in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(
                f"`adapter={self.name!r}`: the factors of {name} have the shapes {list(a)} and {list(b)}, which "
                "do not fit each other. Copy or download the adapter again"
            )
        return place.rank if place else a[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the matrix that is adapted, ``[out, in]``, or of an embedding that is saved whole."""
        if name in self.saved:
            return self._file.entries[f"{PREFIX}{name}.weight"].shape
        self._stored_rank(name)
        place = self._fused.get(name)
        stored, parts = (place.stored, 1 if place.half is None else 2) if place else (name, 1)
        return self._shape(stored, "B")[0] // parts, self._shape(stored, "A")[1]

    def factors(self, name: str) -> StoredFactors:
        """Read the factors of a matrix, as they are stored. ValueError if one is missing, or holds NaN or infinity."""
        self.rank(name)
        return self._run(name, 0) if self.is_on_rounded_base else self._stored_factors(name)

    def start(self, name: str) -> StoredFactors:
        """Read the factors that those of a matrix started with, of an adapter with a `start_rank`."""
        a, b, scaling = self._run(name, 1)
        return StoredFactors(a, -b, scaling)

    def _run(self, name: str, turn: int) -> StoredFactors:
        a, b, scaling = self._stored_factors(name)
        taken = torch.arange(len(a)) // self.start_rank % 2 == turn
        return StoredFactors(a[taken], b[:, taken], scaling)

    def _stored_factors(self, name: str) -> StoredFactors:
        rank, place = self._stored_rank(name), self._fused.get(name)
        alphas = self.config.alpha_pattern or {}
        alpha = alphas.get(get_pattern_key(list(alphas), place.parameter if place else name), self.config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if self.config.use_rslora else rank) * self._scale(name)
        if place is None:
            a, b = (self._read(f"{PREFIX}{name}.lora_{factor}.weight") for factor in "AB")
            return StoredFactors(a, b, scaling)
        rows = (place.expert * rank, (place.expert + 1) * rank)
        a = self._read(f"{PREFIX}{place.stored}.lora_A.weight", rows)
        return StoredFactors(a, place.rows_of_b(self._read(f"{PREFIX}{place.stored}.lora_B.weight")), scaling)

    def delta(self, name: str) -> Tensor:
        """Return the update that is added to a matrix, ``[out, in]`` float32."""
        a, b, scaling = self.factors(name)
        delta: Tensor = (b.float() * scaling) @ a.float()
        return delta

    def vocabulary_rows(self, *, tied: bool) -> int | None:
        """Return the rows of embedding and head that the adapter holds; ``None`` if it does not hold all of them.

        Args:
            tied: The base has one matrix for both.

        Raises:
            ValueError: the two differ.
        """
        if tied:
            self.check_tied()
        rows = {name: self.shape(name)[0] for name in self.saved}
        if len(set(rows.values())) > 1:
            raise UserError(f"the adapter {str(self.folder)!r} has {rows} rows. Expected as many in both")
        return next(iter(rows.values()), None) if tied or len(rows) == len(EMBEDDINGS) else None

    def read_saved(self, name: str) -> Tensor:
        """Read an embedding that was trained as a whole, ``[vocabulary, hidden]`` as it is stored."""
        return self._read(f"{PREFIX}{name}.weight")

    def check_tied(self) -> None:
        """Refuse embedding and head that were trained apart, for a base that has one matrix for both.

        Raises:
            ValueError: the two differ, or only one of them is there, so that PEFT leaves the other as the base has it.
        """
        if not self.saved:
            return
        if len(self.saved) < len(EMBEDDINGS) or not torch.equal(*map(self.read_saved, EMBEDDINGS)):
            raise UserError(
                f"`adapter={self.name!r}` trains {' apart from '.join(reversed(self.saved))}"
                f"{' alone' if len(self.saved) == 1 else ''}, but the base ties embed_tokens and lm_head. Train it in "
                "PEFT with ensure_weight_tying=True, or merge it there and use the merged, untied model as the base"
            )

    def _read_config(self) -> LoraConfig:
        where = f"`adapter={self.name!r}`"
        check_stored_options(read_object(self.folder / CONFIG_NAME, _STRUCTURE, remedy="Copy it again"), where)
        try:
            config = LoraConfig.from_pretrained(str(self.folder))
        except Exception as error:  # PEFT checks some options, and takes others apart
            raise UserError(
                f"{where}: PEFT cannot read its {CONFIG_NAME} ({one_line(error)}). Copy it again"
            ) from error
        assert isinstance(config, LoraConfig)
        return config

    def _scale(self, name: str) -> float:
        match = _LAYER.match(name)
        return self.layer_scale.get(int(match[1]), 1.0) if match else 1.0

    def _shape(self, name: str, factor: str) -> tuple[int, ...]:
        key = f"{PREFIX}{name}.lora_{factor}.weight"
        if key not in self._file.entries:
            raise UserError(f"`adapter={self.name!r}` has no {key}. Copy or download the adapter again")
        return self._file.entries[key].shape

    def _read(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read a tensor of two dimensions, or some rows of it; the first time, the whole file's sum is checked."""
        if not self._is_checked:
            self._file.check_sum()
            self._is_checked = True
        height, width = self._file.entries[key].shape
        first, last = rows or (0, height)
        values = self._file.read(key, first * width, last * width).view(last - first, width)
        if not torch.isfinite(values).all():
            raise UserError(f"`adapter={self.name!r}`: {key} holds NaN or infinite values. Copy it again")
        return values

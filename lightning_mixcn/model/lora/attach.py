"""LoRA through PEFT: the layer beside frozen linear maps, attaching it, and saving and loading adapters.

LoRA: Hu et al. 2021 (https://arxiv.org/abs/2106.09685), ``y = W x + (α/r) B A dropout(x)``. Masters are float32, and
the factors of all experts of a projection are two 2-D parameters, so that FSDP shards them on rows.

In memory an expert's matrices are ``gate_proj up_proj down_proj`` of all experts together, and the router's is
``gate.linear``. On disk they have the family's own names, one pair of factors an expert, which is what stock PEFT, vLLM
and llama.cpp read.

Legend: G groups (experts, or 1), C those of them that have factors, R rank.
"""

import copy
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.causal_lm import MoeForCausalLM, base_of
from lightning_mixcn.model.checkpoints.identity import write_identity
from lightning_mixcn.model.checkpoints.layout import disk_names
from lightning_mixcn.model.nf4.linear import FrozenLinear, LoraFactors, LoraMasters
from lightning_mixcn.model.nf4.storage import NF4Weight, Weight
from lightning_mixcn.model.sharding import copy_to_shard, full_tensor, local_shard

from .adapter_file import EMBEDDINGS, PREFIX, AdapterFile, StoredFactors
from .adapter_writer import write_adapter
from .choice import TrainOnly, chosen_groups
from .options import check_training_options
from .targets import adapted_modules


class _KeptFactors(NamedTuple):
    """Factors in a compute dtype, and what they depend on."""

    factors: LoraFactors
    state: tuple[Any, ...]


class LoraFrozenLinear(nn.Module, LoraLayer):
    """The PEFT layer around a `FrozenLinear`; parameters ``lora_A [C·R, in]`` and ``lora_B [C·out, R]``, float32.

    Args:
        base_layer: Layer to adapt.
        adapter_name: PEFT's name of the adapter.
        config: PEFT's configuration.
        r: Rank of each group's factors.
        lora_alpha: The update is scaled with ``lora_alpha / r`` (``/ √r`` under rsLoRA).
        kwargs: Further keywords that PEFT passes and this layer does not need.
    """

    _kept: _KeptFactors | None = None
    # This rank's rows of the factors that approximate the rounding error, see `rounding_start`, on the CPU: no
    # parameters, which FSDP would gather and checkpoints hold.
    start: tuple[Tensor, ...] | None = None

    def __init__(
        self, base_layer: FrozenLinear, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.groups = base_layer.groups
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    @property
    def storage(self) -> Weight:
        """Return the frozen weights."""
        return cast(FrozenLinear, self.get_base_layer()).storage

    @property
    def slots(self) -> dict[int, int]:
        """Return `FrozenLinear.slots`."""
        return cast(FrozenLinear, self.get_base_layer()).slots

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Tell PEFT the sizes; its default knows the layers of torch and a few libraries only, and warns of others."""
        linear = cast(FrozenLinear, module)
        return linear.in_features, linear.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Make (or remake) the factors of ``adapter_name``."""
        if r <= 0:
            raise UserError(f"`lora.r={r}` must be at least 1. Give a rank such as 64, or lora: null to train none")
        linear = cast(FrozenLinear, self.get_base_layer())
        device = next(linear.parameters()).device
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        for name, factors in (
            (self.lora_A, (linear.in_features, len(self.slots) * r)),
            (self.lora_B, (r, len(self.slots) * linear.out_features)),
        ):
            name[adapter_name] = nn.Linear(*factors, bias=False, device=device, dtype=torch.float32)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)  # type: ignore[no-untyped-call]  # PEFT's
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def weights(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return the float32 parameters, ``[C·R, in]`` and ``[C·out, R]``; DTensors where they are sharded."""
        a, b = (cast(nn.Linear, factor[adapter]).weight for factor in (self.lora_A, self.lora_B))
        return a, b

    def masters(self, adapter: str, *, gather: bool = False) -> tuple[Tensor, Tensor]:
        """Return the same as ``[C, R, in]`` and ``[C, out, R]``.

        Args:
            adapter: Its name.
            gather: Return all of them without autograd where they are sharded; all ranks must call it.
        """
        a, b = map(full_tensor, self.weights(adapter)) if gather else self.weights(adapter)
        count = len(self.slots)
        return a.view(count, self.r[adapter], -1), b.view(count, -1, self.r[adapter])

    @property
    def device(self) -> torch.device:
        """Return the device of the frozen weights."""
        return local_shard(next(self.get_base_layer().parameters()))[0].device

    def held_groups(self, adapter: str) -> list[int]:
        """Return the groups with factors of which this rank holds rows of A or B."""
        held: set[int] = set()
        for weight in self.weights(adapter):
            (shard, first), rows = local_shard(weight), len(weight) // len(self.slots)
            held.update(range(first // rows, -(-(first + len(shard)) // rows)) if len(shard) else ())
        return [group for group, slot in self.slots.items() if slot in held]

    def write_group(self, adapter: str, group: int, a: Tensor, b: Tensor) -> None:
        """Copy one group's factors, ``[R, in]`` and ``[out, R]``, into this rank's shard."""
        for weight, values in zip(self.weights(adapter), (a, b), strict=True):
            shard, held = local_shard(weight)
            first = self.slots[group] * len(values)
            start, stop = max(first, held), min(first + len(values), held + len(shard))
            if start < stop:
                shard[start - held : stop - held] = values[start - first : stop - first].to(shard)

    def start_masters(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return `start` as `masters` gathers the factors, zeros where there is none; all ranks must call it."""
        whole = []
        for weight, rows in zip(self.weights(adapter), self.start or (None, None), strict=True):
            values = torch.zeros_like(weight)
            if rows is not None:
                local_shard(values)[0].copy_(rows)
            whole.append(full_tensor(values))
        count = len(self.slots)
        return whole[0].view(count, self.r[adapter], -1), whole[1].view(count, -1, self.r[adapter])

    def reset_factors(self, adapter: str, init: bool | str) -> None:
        """Start `adapter` as PEFT does, with the numbers that it would draw on one CPU, whatever is held here.

        Args:
            adapter: Its name.
            init: PEFT's `init_lora_weights`: true (A uniform, B = 0), ``gaussian`` (A normal, B = 0), or false (both
                uniform, so that the model changes at once).
        """
        self.start = None
        rank, linear = self.r[adapter], cast(FrozenLinear, self.get_base_layer())
        a = nn.Linear(linear.in_features, len(self.slots) * rank, bias=False).weight.detach()
        b = nn.Linear(rank, len(self.slots) * linear.out_features, bias=False).weight.detach()
        if init == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        elif init:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        for weight, values in zip(self.weights(adapter), (a, torch.zeros_like(b) if init else b), strict=True):
            copy_to_shard(weight, values)

    def factors(self, dtype: torch.dtype, groups: slice = slice(None)) -> LoraFactors | None:
        """Return the active adapters' factors side by side, in ``dtype``; ``None`` when disabled or merged.

        Args:
            dtype: Compute dtype.
            groups: Slots of the groups whose factors are wanted; the others' are not converted.
        """
        kept = self._kept
        if kept is not None and not (self.training or torch.is_grad_enabled()) and kept.state == self._state(dtype):
            return LoraFactors(kept.factors.a[groups], kept.factors.b[groups], 0.0)
        names = self._used_adapters()
        if not names:
            return None
        masters = [self.masters(name) for name in names]
        if groups != slice(None):  # indexing with all of them would copy, and their gradients, too
            masters = [(a[groups], b[groups]) for a, b in masters]
        a = [a.to(dtype) for a, _ in masters]
        b = [b.to(dtype) * self.scaling[name] for name, (_, b) in zip(names, masters, strict=True)]
        if len(names) == 1:
            return LoraFactors(a[0], b[0], self._dropout(names))
        return LoraFactors(torch.cat(a, 1), torch.cat(b, 2), self._dropout(names))

    def active_masters(self) -> LoraMasters | None:
        """Return the active adapters' factors side by side, as they train; ``None`` when disabled or merged."""
        names = self._used_adapters()
        if not names:
            return None
        masters = [self.masters(name) for name in names]
        if len(names) == 1:
            return LoraMasters(*masters[0], self.scaling[names[0]], self._dropout(names))
        b = [b * self.scaling[name] for name, (_, b) in zip(names, masters, strict=True)]
        return LoraMasters(torch.cat([a for a, _ in masters], 1), torch.cat(b, 2), 1.0, self._dropout(names))

    def _used_adapters(self) -> list[str]:
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.lora_A]

    def _dropout(self, names: list[str]) -> float:
        """Return the probability that applies now."""
        return max(cast(nn.Dropout, self.lora_dropout[name]).p for name in names) if self.training else 0.0

    @torch.no_grad()
    def keep_factors(self, dtype: torch.dtype) -> None:
        """Cast the factors now, for all calls without gradients until ``train()``.

        They are cast again in a call where masters, adapters or dtype are others by then.
        """
        self._kept = None
        if (factors := self.factors(dtype)) is not None:
            self._kept = _KeptFactors(factors, self._state(dtype))

    def factor_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes that `keep_factors` takes."""
        linear = cast(FrozenLinear, self.get_base_layer())
        return adapter_rank(self) * len(self.slots) * (linear.in_features + linear.out_features) * dtype.itemsize

    def train(self, mode: bool = True) -> Self:
        """Free the factors that `keep_factors` cast when training begins."""
        if mode:
            self._kept = None
        return super().train(mode)

    def _state(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return all that the factors depend on."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        versions = [tuple(weight._version for weight in self.weights(name)) for name in names]
        scales = [self.scaling[name] for name in names]
        return dtype, names, versions, scales, self.disable_adapters, list(self.merged_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` (one group; stacks of experts run in `experts.block`)."""
        y: Tensor = self.base_layer(x)
        factors = self.factors(x.dtype)
        if factors is None:
            return y
        dropped = F.dropout(x, factors.dropout) if factors.dropout > 0.0 else x
        hidden = F.linear(dropped.reshape(-1, x.shape[-1]), factors.a[0])
        return torch.addmm(y.reshape(-1, y.shape[-1]), hidden, factors.b[0].t()).view_as(y)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what ``adapter`` adds to the weights, ``[G, out, in]`` float32."""
        a, b = self.masters(adapter)
        delta: Tensor = torch.bmm(b, a) * self.scaling[adapter]
        if len(delta) == self.groups:
            return delta
        chosen = torch.tensor(list(self.slots), device=delta.device)
        return delta.new_zeros(self.groups, *delta.shape[1:]).index_copy(0, chosen, delta)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the frozen weights; 4-bit weights are quantised again, which rounds."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._add_to_base(name, 1.0, safe_merge)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what was merged; exact up to rounding."""
        while self.merged_adapters:
            self._add_to_base(self.merged_adapters.pop(), -1.0, safe_merge=False)

    def _add_to_base(self, adapter: str, sign: float, safe_merge: bool) -> None:
        if isinstance(self.storage, NF4Weight):
            warnings.warn(
                "merging LoRA into 4-bit weights quantises them again and rounds; "
                "for a deployed model merge onto the high-precision base instead",
                stacklevel=2,
            )
        merged = self.storage.flat(torch.float32).add_(self.get_delta_weight(adapter).flatten(), alpha=sign)
        if safe_merge and not torch.isfinite(merged).all():
            raise UserError(
                f"merging adapter {adapter!r} gives NaN or infinite weights; the adapter seems to be broken"
            )
        self.storage.write(0, merged)


def adapter_rank(module: nn.Module) -> int:
    """Return the rank of a projection's active adapters together, 0 without any."""
    if not isinstance(module, LoraFrozenLinear) or module.disable_adapters:
        return 0
    return sum(module.r[name] for name in module.active_adapters if name in module.lora_A)


class MoePeftModel(PeftModelForCausalLM):
    """A `peft.PeftModel` whose adapters on disk are in the per-expert layout.

    Attributes:
        base_identity: Path and content hash of the base that was loaded, see `identity.base_identity`; ``None`` for
            random weights. ``base_model_name_or_path`` of the configuration is what other tools load: of a 4-bit
            folder, what that was made from.
    """

    base_identity: dict[str, str] | None = None

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]  # kwargs
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (float32), loadable by stock PEFT.

        ``base_identity.json`` beside them says which base they belong to.
        Factors are padded with zeros to the largest rank, and any scaling other than α/r is folded into B. Where they
        started from the rounding error, the start is subtracted, at twice the rank, so that the adapter belongs to the
        high-precision base; `AdapterFile.on_rounded_base` leaves that out again.

        Args:
            save_directory: Folder, made if missing.
            kwargs: PEFT's further options. ``is_main_process``: whether to write; where the adapter is sharded, all
                ranks must call this, and one writes. The others have no effect here.
        """
        folder = Path(save_directory)
        start_rank = stored_start_rank(self)
        factors, saved = stored_adapter(self)
        if not kwargs.get("is_main_process", True):
            return
        folder.mkdir(parents=True, exist_ok=True)
        base = cast(MoeForCausalLM, self.get_base_model())
        name = _lora_config(self).base_model_name_or_path
        write_adapter(folder, factors, saved, base.config, name, start_rank=start_rank)
        if self.base_identity is not None:
            write_identity(folder, self.base_identity)


def attach_lora(
    model: MoeForCausalLM, lora: LoraConfig, train_only: TrainOnly | str | Path | None = None
) -> MoePeftModel:
    """Wrap ``model`` with LoRA adapters, which `reset_lora` gives their values.

    Args:
        model: The frozen base, on the meta device.
        lora: PEFT's configuration, with the names of adapter files or of memory; see `lora_targets`.
        train_only: What of that has adapters at all, see `choice`; null for all of it.

    Raises:
        ValueError: an option that is not implemented, a name or pattern that matches nothing, or a choice that does
            not fit the model.
    """
    check_training_options(lora)
    groups = {name: module.groups for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    others = {name for name, _ in model.named_modules()} - groups.keys()
    chosen = adapted_modules(lora, model.architecture, groups, others)
    if train_only is not None:
        kept = chosen_groups(train_only, groups, chosen)
        chosen = {name: adaptation for name, adaptation in chosen.items() if kept[name]}
        for name, numbers in kept.items():
            cast(FrozenLinear, model.get_submodule(name)).slots = {group: slot for slot, group in enumerate(numbers)}
    config = copy.deepcopy(lora)
    # PEFT gets the modules' names one by one: it knows neither the paper's names nor that a key means a stack.
    config.target_modules = sorted(chosen)
    config.rank_pattern = {re.escape(name): rank for name, (rank, _) in chosen.items() if rank != config.r}
    config.alpha_pattern = {re.escape(name): alpha for name, (_, alpha) in chosen.items() if alpha != config.lora_alpha}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.task_type = "CAUSAL_LM"
    config.base_model_name_or_path = model.name_or_path or config.base_model_name_or_path
    config._register_custom_module({FrozenLinear: LoraFrozenLinear})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT asks transformers for it
        with _without_conversion(model):
            wrapped = MoePeftModel(model, config)
    for parameter in trained:  # PEFT froze the trained embeddings with the rest
        parameter.requires_grad_(True)
    adapted = {name: (layer.r["default"], layer.lora_alpha["default"]) for name, layer in lora_layers(wrapped)}
    assert adapted == chosen, "PEFT adapted other modules than those of its configuration"
    return wrapped


@contextmanager
def _without_conversion(model: Any) -> Iterator[None]:
    """Keep PEFT from rewriting targets: it takes names of experts' matrices for those of transformers 4's modules.

    It goes by the type of the model, which is another one meanwhile.
    """
    model_type = model.config.model_type
    model.config.model_type = f"frozen {model_type}"
    try:
        yield
    finally:
        model.config.model_type = model_type


def reset_lora(model: MoePeftModel, seed: int) -> None:
    """Give the active adapter its random start, the same for any number of ranks: A random, B = 0.

    Args:
        model: Its adapters have memory.
        seed: Seed of the random numbers; torch's global generator is left as it was.
    """
    config = _lora_config(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, layer in lora_layers(model):
            layer.reset_factors(model.active_adapter, config.init_lora_weights)


def _lora_config(model: MoePeftModel) -> LoraConfig:
    return cast(LoraConfig, model.peft_config[model.active_adapter])


def _weight(model: MoePeftModel, name: str) -> Tensor:
    return cast(nn.Linear, model.get_base_model().get_submodule(name)).weight


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraFrozenLinear]]:
    """Yield each LoRA layer with the name of the module that it adapts, as ``model.layers.0.mlp.experts.up_proj``."""
    for name, module in model.named_modules():
        if isinstance(module, LoraFrozenLinear):
            yield name.removeprefix(PREFIX), module


def stored_start_rank(model: MoePeftModel) -> int:
    """Return the rank of the start that `stored_adapter` subtracts, 0 where LoRA started beside the base."""
    layers = [layer for _, layer in lora_layers(model)]
    if all(layer.start is None for layer in layers):
        return 0
    return max(int(layer.r[model.active_adapter]) for layer in layers)


def stored_adapter(model: MoePeftModel) -> tuple[dict[str, StoredFactors], dict[str, Tensor]]:
    """Return the active adapter as it is written, float32 on the CPU; all ranks must call it where it is sharded.

    Returns:
        Name of a matrix → its factors, and name of an embedding that is trained as a whole → its values. With a start
        from the rounding error, factors are ``[A; A₀]`` and ``[B, −B₀]``, each padded to `stored_start_rank`.
    """
    active, start_rank = model.active_adapter, stored_start_rank(model)
    factors: dict[str, StoredFactors] = {}
    architecture = base_of(model).architecture
    for module_name, layer in lora_layers(model):
        a, b = (master.cpu() for master in layer.masters(active, gather=True))
        if start_rank:
            extra = start_rank - layer.r[active]
            start_a, start_b = (master.cpu() for master in layer.start_masters(active))
            a = torch.cat([F.pad(part, (0, 0, 0, extra)) for part in (a, start_a)], 1)
            b = torch.cat([F.pad(part, (0, extra)) for part in (b, -start_b)], 2)
        names = disk_names(architecture, module_name, layer.groups)
        for group, slot in layer.slots.items():
            factors[names[group]] = StoredFactors(a[slot], b[slot], layer.scaling[active])
    trained = {name: weight for name in EMBEDDINGS if (weight := _weight(model, name)).requires_grad}
    return factors, {name: full_tensor(weight).cpu().clone() for name, weight in trained.items()}


def load_adapter(model: MoePeftModel, adapter: AdapterFile) -> None:
    """Fill the active adapter from a folder in the per-expert layout (ours, or a published adapter).

    Args:
        model: Its adapters have memory; each rank fills its shard.
        adapter: Its scaling is kept: where it differs from `model`'s, B takes the difference. A start from the rounding
            error that it holds is kept, to be subtracted again.

    Raises:
        ValueError: an expert without adapter, another rank, or factors for what is not adapted here.
    """
    active = model.active_adapter
    left, architecture = set(adapter.names), base_of(model).architecture
    with torch.no_grad():
        for module_name, layer in lora_layers(model):
            of_groups, rank = disk_names(architecture, module_name, layer.groups), layer.r[active]
            names = [of_groups[group] for group in layer.slots]
            for name in names:
                if name not in adapter:
                    raise UserError(
                        f"`adapter={adapter.name!r}` has no {name}.lora_A, but `lora` adapts it here. Leave it out of "
                        "`lora.target_modules`, or give `train_only` as the adapter was trained"
                    )
                if adapter.rank(name) != rank:
                    raise UserError(
                        f"`adapter={adapter.name!r}`: {name} has the rank {adapter.rank(name)}, expected {rank}. "
                        f"Set `lora.r={adapter.rank(name)}`, as the adapter was trained"
                    )
            left.difference_update(names)
            stored = [adapter.factors(name) for name in names]
            a, b = layer.weights(active)
            # With a B of zeros, an A of zeros would never train. One is written for an expert that was not chosen.
            is_blank = [not factors.a.any() and not factors.b.any() for factors in stored]
            _fill(a, [factors.a for factors in stored], adapter.name, names, is_blank)
            scaled = [factors.b.float() * (factors.scaling / layer.scaling[active]) for factors in stored]
            _fill(b, scaled, adapter.name, names)
            if adapter.is_on_rounded_base:
                starts = [adapter.start(name) for name in names]
                start_b = [start.b.float() * (start.scaling / layer.scaling[active]) for start in starts]
                layer.start = _held(a, [start.a.float() for start in starts]), _held(b, start_b)
    for name in adapter.saved:
        _fill(_weight(model, name), [adapter.read_saved(name)], adapter.name, [name])
    for name in sorted(left):
        if adapter.factors(name).b.any():  # a B of zeros adds nothing
            raise UserError(
                f"`adapter={adapter.name!r}` trains {name}, which `lora.target_modules` or `train_only` leaves out here"
            )


def _held(parameter: Tensor, groups: list[Tensor]) -> Tensor:
    """Return what this rank holds of a parameter of these values of its groups."""
    shard, first = local_shard(parameter)
    return torch.cat(groups)[first : first + len(shard)].clone()


def _fill(
    parameter: Tensor, groups: list[Tensor], adapter: str, names: list[str], left: Sequence[bool] | None = None
) -> None:
    """Fill a parameter with the values of its groups, one below the other, but for those that are ``left``."""
    values = torch.cat(groups)
    if values.shape != parameter.shape:
        raise UserError(
            f"`adapter={adapter!r}`: {names[0]} has the shape {list(values.shape)}, the base has "
            f"{list(parameter.shape)}. Give the base that the adapter was trained on"
        )
    if left is not None and any(left):
        shard, first = local_shard(parameter)
        rows = torch.tensor(left).repeat_interleave(len(values) // len(left))[first : first + len(shard)]
        values[first : first + len(shard)][rows] = shard[rows.to(shard.device)].to(values)
    copy_to_shard(parameter, values)

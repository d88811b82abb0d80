"""LoRA beside frozen linear maps, as a PEFT layer: float32 masters, split computation, one pair of factors an expert.

LoRA: Hu et al. 2021 (https://arxiv.org/abs/2106.09685), ``y = W x + (α/r) B A dropout(x)``. The factors of all experts
of a projection are two 2-D parameters, so that FSDP shards them on rows.

Legend: G groups (experts, or 1), R rank.
"""

import math
import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.nf4.linear import FrozenLinear, LoraFactors
from lightning_mixcn.model.nf4.storage import NF4Weight, Weight
from lightning_mixcn.model.sharding import copy_to_shard, full_tensor


class LoraFrozenLinear(nn.Module, LoraLayer):
    """The PEFT layer around a `FrozenLinear`; parameters ``lora_A [G·R, in]`` and ``lora_B [G·out, R]``, float32.

    Args:
        base_layer: What is adapted.
        adapter_name: PEFT's name of the adapter.
        config: PEFT's configuration.
        r: Rank of each group's factors.
        lora_alpha: The update is scaled with ``lora_alpha / r`` (``/ √r`` under rsLoRA).
        kwargs: Further keywords that PEFT passes and this layer does not need.
    """

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
        """The frozen weights."""
        return cast(FrozenLinear, self.get_base_layer()).storage

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """PEFT's hook; its default knows the layers of torch and a few libraries only, and warns of others."""
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
            (self.lora_A, (linear.in_features, self.groups * r)),
            (self.lora_B, (r, self.groups * linear.out_features)),
        ):
            name[adapter_name] = nn.Linear(*factors, bias=False, device=device, dtype=torch.float32)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)  # type: ignore[no-untyped-call]  # PEFT's
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def weights(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The float32 parameters of ``adapter``, ``[G·R, in]`` and ``[G·out, R]``; DTensors where they are sharded."""
        a, b = (cast(nn.Linear, factor[adapter]).weight for factor in (self.lora_A, self.lora_B))
        return a, b

    def masters(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The same as ``[G, R, in]`` and ``[G, out, R]``."""
        return self._by_group(adapter, *self.weights(adapter))

    def gathered_masters(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The same whole and without autograd where they are sharded; all ranks must call it."""
        return self._by_group(adapter, *map(full_tensor, self.weights(adapter)))

    def _by_group(self, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.view(self.groups, self.r[adapter], -1), b.view(self.groups, -1, self.r[adapter])

    def reset_factors(self, adapter: str, init: bool | str) -> None:
        """Start `adapter` as PEFT does, with the numbers that it would draw on one CPU, whatever is held here.

        Args:
            adapter: Its name.
            init: PEFT's `init_lora_weights`: true (A uniform, B = 0), ``gaussian`` (A normal, B = 0), or false (both
                uniform, so that the model changes at once).
        """
        rank, linear = self.r[adapter], cast(FrozenLinear, self.get_base_layer())
        a = nn.Linear(linear.in_features, self.groups * rank, bias=False).weight.detach()
        b = nn.Linear(rank, self.groups * linear.out_features, bias=False).weight.detach()
        if init == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        elif init:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        for weight, values in zip(self.weights(adapter), (a, torch.zeros_like(b) if init else b), strict=True):
            copy_to_shard(weight, values)

    def factors(self, dtype: torch.dtype, groups: slice = slice(None)) -> LoraFactors | None:
        """The active adapters' factors side by side, in ``dtype``; ``None`` when disabled or merged.

        Args:
            dtype: Compute dtype.
            groups: Of which groups; the others' are not converted.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return None
        masters = [self.masters(name) for name in names]
        a = [a[groups].to(dtype) for a, _ in masters]
        b = [b[groups].to(dtype) * self.scaling[name] for name, (_, b) in zip(names, masters, strict=True)]
        dropout = max(cast(nn.Dropout, self.lora_dropout[name]).p for name in names) if self.training else 0.0
        if len(names) == 1:
            return LoraFactors(a[0], b[0], dropout)
        return LoraFactors(torch.cat(a, 1), torch.cat(b, 2), dropout)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in]`` to ``[..., out]`` (one group; stacks of experts run in `experts.block`)."""
        y: Tensor = self.base_layer(x)
        factors = self.factors(x.dtype)
        if factors is None:
            return y
        dropped = F.dropout(x, factors.dropout) if factors.dropout > 0.0 else x
        hidden = F.linear(dropped.reshape(-1, x.shape[-1]), factors.a[0])
        return torch.addmm(y.reshape(-1, y.shape[-1]), hidden, factors.b[0].t()).view_as(y)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What ``adapter`` adds to the weights, ``[G, out, in]`` float32."""
        a, b = self.masters(adapter)
        delta: Tensor = torch.bmm(b, a) * self.scaling[adapter]
        return delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the frozen weights; 4-bit weights are quantised anew, which rounds."""
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
    """Rank of a projection's active adapters together, 0 without any."""
    if not isinstance(module, LoraFrozenLinear) or module.disable_adapters:
        return 0
    return sum(module.r[name] for name in module.active_adapters if name in module.lora_A)

"""Expert load since the last log: of this rank on its device, and of all ranks on the CPU.

Legend: B rows, S positions of a row, T = B * S tokens, G groups, L layers, E experts, K experts a token.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.schema import ANYTHING, NULL, TEXT, Check, each, either, mapping_of, record, row_of
from lightning_mixcn.metrics.expert_load import ExpertLoad, LoadSums
from lightning_mixcn.modules.checkpoint_schema import COUNT, require_state, tensor_of

Batch = dict[str, Tensor]


SIDES = ("chosen", "rejected")
_SIDES_AND_REST = (*SIDES, "other")  # prompts, and answers without a side


class LoadWindow:
    """Sums of one stage, by source and position, and by side where batches have pairs of answers.

    Args:
        sources: Names of the sources that ``source_ids`` counts; empty counts all tokens together.
        has_sides: True to count tokens of chosen and of rejected answers apart, by ``sides`` of the batches.
        position_boundaries: Where buckets of positions inside a document begin, beside the one that begins at 0.
        num_layers: Layers of the model.
        num_experts: Experts of a layer.
        device: Where the batches are.
    """

    def __init__(
        self,
        sources: Sequence[str],
        position_boundaries: Sequence[int],
        num_layers: int,
        num_experts: int,
        device: torch.device,
        has_sides: bool = False,
    ) -> None:
        self.sources, self.boundaries = list(sources), list(position_boundaries)
        self.sides = _SIDES_AND_REST if has_sides else ()
        self.num_buckets = len(self.boundaries) + 1
        self._groups_of_source = max(1, len(self.sides)) * self.num_buckets
        # One group more than sources, sides and buckets have: tokens whose source has no name.
        num_groups = max(1, len(self.sources)) * self._groups_of_source + 1
        self._load = ExpertLoad(num_groups, num_layers, num_experts).to(device)
        self._totals = self._empty()
        self._groups: Tensor | None = None

    def open_batch(self, batch: Batch) -> None:
        """Expect the forward pass of a batch: ``document_ids``, ``source_ids``, ``position_ids``, each ``[B, S]``.

        Where sides are counted, ``sides`` and ``labels``, too: what has a label is an answer.
        """
        documents_BS, positions_BS = batch["document_ids"], batch["position_ids"]
        group_BS = torch.zeros_like(documents_BS, dtype=torch.int64)
        for boundary in self.boundaries:
            group_BS += positions_BS >= boundary
        if self.sides:
            side_BS = torch.where(batch["labels"] >= 0, batch["sides"].long(), 0)
            group_BS += self.num_buckets * torch.where(side_BS > 0, 0, torch.where(side_BS < 0, 1, 2))
        if self.sources:
            source_ids = batch["source_ids"]  # [B, S], or [B] where a row has one source
            source_BS = source_ids.view(len(source_ids), -1).expand_as(documents_BS).long()
            known_BS = (source_BS >= 0) & (source_BS < len(self.sources))
            last = len(self.sources) * self._groups_of_source
            group_BS = torch.where(known_BS, group_BS + source_BS * self._groups_of_source, last)
        self._groups = torch.where(documents_BS >= 0, group_BS, -1).flatten()

    def close_batch(self) -> None:
        """End the batch's forward pass."""
        self._groups = None

    def observe(self, layer: int, logits_TE: Tensor, _weights_TK: Tensor, index_TK: Tensor) -> None:
        """Count a router's choices, if they are those of the open batch."""
        if self._groups is not None and len(self._groups) == len(index_TK):
            self._load.update(layer, logits_TE, index_TK, self._groups)

    def sum_up(self, trainer: Trainer) -> LoadSums:
        """Add this rank's sums to those of all ranks; called on all of them at the same time.

        Returns:
            Sums over all ranks since `clear`, on the CPU.

        Raises:
            ValueError: tokens belong to none of the sources.
        """
        mine = [getattr(self._load, name) for name in LoadSums._fields]
        # One reduction instead of torchmetrics' one for each state: float64 holds counts exactly up to 2⁵³. It works in
        # place, on the copy that `cat` makes.
        packed = torch.cat([part.double().flatten() for part in mine])
        summed = trainer.strategy.reduce(packed, reduce_op="sum").cpu()
        self._load.reset()
        parts = summed.split([part.numel() for part in mine])
        self._totals = LoadSums(
            *(
                before + part.view(before.shape).to(before.dtype)
                for before, part in zip(self._totals, parts, strict=True)
            )
        )
        if strangers := int(self._totals.tokens[-1].max()):
            raise UserError(
                f"{strangers} tokens have `source_ids` outside of 0 to {len(self.sources) - 1}; the data module's "
                f"`source_names` gives {self.sources}. Name every source, or give padding the `document_ids` -1"
            )
        return self._totals

    def clear(self) -> None:
        """Forget all sums."""
        self._load.reset()
        self._totals = self._empty()

    def by_source(self, sums: LoadSums) -> dict[str, LoadSums]:
        """Return the sums ``[L]`` of each source that has tokens in every layer."""
        size = self._groups_of_source
        return _counted({name: range(i * size, (i + 1) * size) for i, name in enumerate(self.sources)}, sums)

    def by_side(self, sums: LoadSums) -> dict[str, LoadSums]:
        """Return the sums ``[L]`` of the answers of each of `SIDES` that have tokens in every layer."""
        groups = range(len(sums.counts) - 1)
        parts = {
            name: [group for group in groups if group // self.num_buckets % len(self.sides) == i]
            for i, name in enumerate(SIDES)
            if self.sides
        }
        return _counted(parts, sums)

    def names(self) -> list[str]:
        """Return the name of each group but the last, for `experts.csv`: its source, and its side after a slash."""
        sources = self.sources or ["all"]
        kinds = [f"{name}/{side}" for name in sources for side in self.sides] if self.sides else sources
        return [kind for kind in kinds for _ in range(self.num_buckets)]

    def by_position(self, sums: LoadSums) -> dict[int, LoadSums]:
        """Return the sums ``[L]`` of each bucket of positions, by its first position."""
        last = len(sums.counts) - 1
        return {
            start: sums.of_groups(range(bucket, last, self.num_buckets))
            for bucket, start in enumerate(self.bucket_starts())
        }

    def bucket_starts(self) -> list[int]:
        """Return the first position of each bucket."""
        return [0, *self.boundaries]

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of all ranks."""
        groups = {"sources": self.sources, "boundaries": self.boundaries, "sides": list(self.sides)}
        return groups | {"sums": list(self._totals)}

    def structure_of_state(self) -> Check:
        """Return the structure of a monitor's state; the sums' own is checked where they are of the same groups."""
        shares_LE = either(NULL, tensor_of(self._totals.counts.shape[1:]))
        sums = each(ANYTHING, len(LoadSums._fields))
        return record(
            {
                "logged_at": COUNT,
                "base_shares": shares_LE,
                "starving": record({"steps": shares_LE}),
                "window": record(
                    {"sources": each(TEXT), "boundaries": each(COUNT), "sums": sums}, {"sides": each(TEXT)}
                ),
            },
            {"base_entropy": mapping_of(TEXT, tensor_of(self._totals.tokens.shape[1:]))},
        )

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from a checkpoint; return ``False`` if it counted other groups of tokens, which are forgotten then."""
        groups = state["sources"], state["boundaries"], state.get("sides", [])
        if groups != (self.sources, self.boundaries, list(self.sides)):
            return False
        require_state(self, state["sums"], row_of(*(tensor_of(part.shape) for part in self._totals)))
        self._totals = LoadSums(*state["sums"])
        return True

    def _empty(self) -> LoadSums:
        parts = (torch.zeros_like(getattr(self._load, name), device="cpu") for name in LoadSums._fields)
        return LoadSums(*parts)


def _counted(groups: Mapping[str, Iterable[int]], sums: LoadSums) -> dict[str, LoadSums]:
    """Add up the groups of each name; leave out what has no tokens in a layer."""
    parts = {name: sums.of_groups(chosen) for name, chosen in groups.items()}
    return {name: part for name, part in parts.items() if int(part.tokens.min())}


_NAMED = 32  # starving experts at most: of 128 in 48 layers, thousands may starve


class StarvingExperts:
    """Counts for each expert the optimizer steps that it has been under a share of its layer's tokens.

    Args:
        share: The share, in uniform shares (1 / E).
        steps: Optimizer steps after which an expert is warned of.
    """

    def __init__(self, share: float, steps: int) -> None:
        self.share, self.steps = share, steps
        self._steps_LE: Tensor | None = None

    def update(self, shares_LE: Tensor, steps: int) -> list[tuple[int, int]]:
        """Add some steps.

        Args:
            shares_LE: Share of each expert in its layer, over these steps.
            steps: Number of these steps.

        Returns:
            Layer and expert of those that have now starved for long enough and had not before.
        """
        before_LE = torch.zeros_like(shares_LE, dtype=torch.int64) if self._steps_LE is None else self._steps_LE
        is_under_LE = shares_LE < self.share / shares_LE.shape[-1]
        self._steps_LE = torch.where(is_under_LE, before_LE + steps, 0)
        is_new_LE = (before_LE < self.steps) & (self._steps_LE >= self.steps)
        return [(layer, expert) for layer, expert in is_new_LE.nonzero().tolist()]

    def warning(self, starving: list[tuple[int, int]]) -> str:
        """Name the experts in one line, or how many they are."""
        by_layer: dict[int, list[str]] = {}
        for layer, expert in starving:
            by_layer.setdefault(layer, []).append(str(expert))
        names = "; ".join(f"layer {layer}: {', '.join(experts)}" for layer, experts in by_layer.items())
        if len(starving) > _NAMED:
            most = max(by_layer, key=lambda layer: len(by_layer[layer]))
            names = (
                f"{len(starving)} in {len(by_layer)} layers, the most in layer {most}, {len(by_layer[most])} of them; "
                "`experts.csv` has their tokens"
            )
        return (
            f"Experts have starved for {self.steps} optimizer steps, with less than {self.share:g} of a uniform share "
            f"of their layer's tokens: {names}. A larger `model.init_args.router_aux_loss_coef` evens the load out"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the steps of each expert."""
        return {"steps": self._steps_LE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._steps_LE = state["steps"]

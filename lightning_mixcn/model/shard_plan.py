"""What ranks hold and move when they share a model: sizes on paper, for plans and for comparing with measurements."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Sharing:
    """How ranks share parameters, see `modules.strategies`.

    Args:
        kind: ``whole``: one rank, or DDP. ``fsdp1`` shards what trains, ``fsdp2`` everything.
        ranks: That share one copy.
        copies: Of the model, over all ranks.
        reshard_after_forward: Whether a layer's gathered parameters are freed between forward and backward.
        prefetch: Layers gathered ahead of the one that computes.
        gradient_copies: Copies of the gradients beside those of the parameters, as DDP's buckets are.
    """

    kind: Literal["whole", "fsdp1", "fsdp2"] = "whole"
    ranks: int = 1
    copies: int = 1
    reshard_after_forward: bool = True
    prefetch: int = 1
    gradient_copies: int = 0

    def base(self, size: int) -> int:
        """Bytes that a rank holds of ``size`` frozen ones."""
        return -(-size // self.ranks) if self.kind == "fsdp2" else size

    def trained(self, size: int) -> int:
        """Bytes that a rank holds of ``size`` that train, or of their gradients once reduced, or their moments."""
        return size if self.kind == "whole" else -(-size // self.ranks)

    def gathered(self, frozen: int, trained: int, layers: int) -> int:
        """Bytes beside its own that a rank holds while a layer computes.

        Args:
            frozen: Bytes of the layer that do not train.
            trained: And of its masters.
            layers: Of the model.
        """
        if self.kind == "whole" or self.ranks == 1:
            return 0
        whole = trained + (frozen if self.kind == "fsdp2" else 0)
        # Backward gathers one layer ahead whatever `prefetch` says.
        at_once = 1 + max(1, self.prefetch) if self.kind == "fsdp1" or self.reshard_after_forward else layers
        return whole * min(at_once, layers)

    def moved(self, whole: int, trained: int, micro_batches: int) -> dict[str, float]:
        """Bytes that a rank sends in a step under FSDP2, when collectives go round a ring.

        A ring moves (N-1)/N of a gathered or scattered tensor through each of N ranks, and twice that of one that is
        all-reduced.

        Args:
            whole: Bytes of all parameters.
            trained: Bytes of the gradients.
            micro_batches: Of a step; gradients are reduced in its last one.
        """
        share = (self.ranks - 1) / self.ranks
        passes = (2 if self.reshard_after_forward else 1) * micro_batches
        moved = {"all_gather": share * whole * passes, "reduce_scatter": share * trained}
        if self.copies > 1:
            moved["all_reduce"] = 2 * (self.copies - 1) / self.copies * trained / self.ranks
        return moved

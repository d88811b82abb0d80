"""Experts that get next to nothing, for how long.

Legend: L layers, E experts.
"""

from typing import Any

import torch
from torch import Tensor


class StarvingExperts:
    """Counts for each expert the optimizer steps that it has been under a share of its layer's tokens.

    Args:
        share: The share, in uniform shares (1 / E).
        steps: Optimizer steps after which an expert is told of.
    """

    def __init__(self, share: float, steps: int) -> None:
        self.share, self.steps = share, steps
        self._steps_LE: Tensor | None = None

    def update(self, shares_LE: Tensor, steps: int) -> list[tuple[int, int]]:
        """Add some steps.

        Args:
            shares_LE: Share of each expert in its layer, over these steps.
            steps: How many they are.

        Returns:
            Layer and expert of those that have now starved for long enough and had not before.
        """
        before_LE = torch.zeros_like(shares_LE, dtype=torch.int64) if self._steps_LE is None else self._steps_LE
        is_under_LE = shares_LE < self.share / shares_LE.shape[-1]
        self._steps_LE = torch.where(is_under_LE, before_LE + steps, 0)
        is_new_LE = (before_LE < self.steps) & (self._steps_LE >= self.steps)
        return [(layer, expert) for layer, expert in is_new_LE.nonzero().tolist()]

    def warning(self, starving: list[tuple[int, int]]) -> str:
        """One line that names the experts."""
        by_layer: dict[int, list[str]] = {}
        for layer, expert in starving:
            by_layer.setdefault(layer, []).append(str(expert))
        names = "; ".join(f"layer {layer}: {', '.join(experts)}" for layer, experts in by_layer.items())
        return (
            f"Experts have starved for {self.steps} optimizer steps, with less than {self.share:g} of a uniform share "
            f"of their layer's tokens: {names}. A larger `model.init_args.router_aux_loss_coef` evens the load out"
        )

    def state_dict(self) -> dict[str, Any]:
        """Steps of each expert."""
        return {"steps": self._steps_LE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._steps_LE = state["steps"]

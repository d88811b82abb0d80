"""The layers above a disabled expert, for many experts in one pass: what every measure of their importance shares.

For a batch the residual stream at each layer's input is computed once. A layer with an expert disabled costs next to
nothing (see `ablated_layer`), so what is left is the layers above it: on average half of the model. They run for
several experts of one layer in one pass, so 4-bit weights are decoded once for all of them. A row in which no token
chose the expert is as it was, and is not run.

Legend: B rows, S positions of a row, T = B·S tokens, H hidden, E experts, n rows of a pass.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mixcn.model.adapters import base_of

from .ablated_layer import AblatedLayer, layer_arguments
from .disabled_expert import DisabledExpert, Mode
from .expert_flops import ForwardFlops

Batch = dict[str, Tensor]


class DisabledPasses:
    """Runs a model with each expert of a layer disabled, batch by batch.

    Args:
        model: A Mixtral of `load_mixtral` or the PeftModel around it, in evaluation mode.
        modes: How experts are disabled.
        micro_batch_size: Rows of a batch; a pass through the layers above runs at most E times as many.

    Attributes:
        base: The Mixtral inside.
        variants: What is disabled in each layer, one at a time.
        num_layers: Of the model.
        num_experts: E.
        rows_per_pass: Rows of a pass at most.
        forward: What parts of a forward pass cost.
    """

    def __init__(self, model: nn.Module, modes: Sequence[Mode], micro_batch_size: int) -> None:
        """Nothing is computed yet."""
        self.base: Any = base_of(model)
        self.num_layers: int = self.base.config.num_hidden_layers
        self.num_experts: int = self.base.config.num_local_experts
        self.variants = [DisabledExpert(mode, expert) for mode in modes for expert in range(self.num_experts)]
        self.rows_per_pass = micro_batch_size * self.num_experts
        self.forward = ForwardFlops.of(model)

    def on_device(self, batch: Batch) -> Batch:
        """A batch where the model is."""
        device = next(self.base.parameters()).device
        return {name: part.to(device) for name, part in batch.items()}

    def whole(self, batch: Batch) -> Tensor:
        """What the head is given of a batch as the model is, ``[B, S, H]``; arguments as those of `layers`."""
        arguments = layer_arguments(self.base, batch["position_ids"])
        hidden_BSH: Tensor = self.base.model.embed_tokens(batch["input_ids"])
        for layer in self.base.model.layers:
            hidden_BSH = layer(hidden_BSH, **arguments)
        normed_BSH: Tensor = self.base.model.norm(hidden_BSH)
        return normed_BSH

    def layers(self, batch: Batch, wanted: Sequence[int]) -> Iterator[tuple[int, AblatedLayer]]:
        """Run the model up to the highest wanted layer, and give those that are wanted with all their variants.

        Args:
            batch: ``input_ids``, ``position_ids`` int64 ``[B, S]``, on the model's device.
            wanted: Numbers of the layers, ascending.

        Yields:
            Number of a layer, and the layer as it ran.
        """
        hidden_BSH = self.base.model.embed_tokens(batch["input_ids"])
        arguments = layer_arguments(self.base, batch["position_ids"])
        for number in range(max(wanted, default=-1) + 1):
            variants = self.variants if number in wanted else []
            layer = AblatedLayer(self.base.model.layers[number], hidden_BSH, arguments, variants)
            if variants:
                yield number, layer
            hidden_BSH = layer.output()

    def above(self, number: int, layer: AblatedLayer, batch: Batch) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        """Run the layers above for every variant and every row that it changes.

        Args:
            number: Of the layer.
            layer: As it ran on the batch.
            batch: ``position_ids`` int64 ``[B, S]``, and ``document_ids``, −1 in padding.

        Yields:
            Number of the variant and of the row of each of a pass's rows, and what the head is given of them
            ``[n, S, H]``.
        """
        model = self.base.model
        for units, hidden_nSH in self._changed(layer, batch["document_ids"] >= 0):
            arguments = layer_arguments(self.base, batch["position_ids"][[row for _, row in units]])
            for above in model.layers[number + 1 :]:
                hidden_nSH = above(hidden_nSH, **arguments)
            yield units, model.norm(hidden_nSH)

    def _changed(self, layer: AblatedLayer, real_BS: Tensor) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        """Changed rows, as many at a time as a pass may have: which variant and row each is, and ``[n, S, H]``."""
        units: list[tuple[int, int]] = []
        waiting: list[Tensor] = []
        for variant in range(len(self.variants)):
            rows = layer.changed_rows(variant, real_BS)
            if not len(rows):
                continue
            units += [(variant, row) for row in rows.tolist()]
            waiting.append(layer.output_without(variant, rows))
            while len(units) >= self.rows_per_pass:
                hidden_nSH, size = torch.cat(waiting), self.rows_per_pass
                yield units[:size], hidden_nSH[:size]
                units, waiting = units[size:], [hidden_nSH[size:]]
        if units:
            yield units, torch.cat(waiting)

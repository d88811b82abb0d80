"""Plan the bytes of a training run by purpose, before anything is loaded.

A step is followed through its moments — the last layer's forward, the loss, each layer's backward, the update — and the
fullest one is the plan. Activations are those of `activation_memory`; everything else is sizes of parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_mixcn.model.causal_lm import base_of, bytes_in_memory

from .layer import MicroBatch, model_activations
from .optimizer import OptimizerMemory


@dataclass(frozen=True)
class Sharing:
    """Distribution of parameters over ranks, see `modules.strategies`.

    Args:
        kind: ``whole``: one rank, or DDP. ``fsdp2`` shards everything.
        ranks: Number of ranks that share one copy.
        copies: Number of copies of the model, over all ranks.
        reshard_after_forward: A layer's gathered parameters are freed between forward and backward.
        prefetch: Layers gathered ahead of the one that computes.
        gradient_copies: Copies of the gradients beside those of the parameters, as DDP's buckets are.
    """

    kind: Literal["whole", "fsdp2"] = "whole"
    ranks: int = 1
    copies: int = 1
    reshard_after_forward: bool = True
    prefetch: int = 1
    gradient_copies: int = 0

    def base(self, size: int) -> int:
        """Return the bytes that a rank holds of ``size`` frozen ones."""
        return -(-size // self.ranks) if self.kind == "fsdp2" else size

    def trained(self, size: int) -> int:
        """Return the bytes that a rank holds of ``size`` that train, of their reduced gradients, or their moments."""
        return size if self.kind == "whole" else -(-size // self.ranks)

    def gathered(self, frozen: int, trained: int, layers: int, *, forward: bool) -> int:
        """Return the bytes beside its own that a rank holds while a layer computes.

        Args:
            frozen: Bytes of the layer that do not train.
            trained: Bytes of its masters.
            layers: Number of layers that are gathered in turn; 1 for the head, which is gathered alone.
            forward: It computes forward, not backward.
        """
        if self.kind == "whole" or self.ranks == 1:
            return 0
        # Backward gathers one layer ahead whatever `prefetch` says.
        ahead = max(1, self.prefetch) if self.reshard_after_forward else layers - 1
        # Parameters are cut out of what was gathered in one piece, which forward keeps until the next layer's have
        # been, so that the device need not wait: FSDPParamGroup.wait_for_unshard.
        return (frozen + trained) * (min(1 + ahead, layers) + forward)

    def moved(self, whole: int, trained: int, micro_batches: int) -> dict[str, float]:
        """Return the bytes that a rank sends in a step under FSDP2, when collectives go round a ring.

        A ring moves (N-1)/N of a gathered or scattered tensor through each of N ranks, and twice that of one that is
        all-reduced.

        Args:
            whole: Bytes of all parameters.
            trained: Bytes of the gradients.
            micro_batches: Number of micro-batches in a step; gradients are reduced in its last one.
        """
        share = (self.ranks - 1) / self.ranks
        passes = (2 if self.reshard_after_forward else 1) * micro_batches
        moved = {"all_gather": share * whole * passes, "reduce_scatter": share * trained}
        if self.copies > 1:
            moved["all_reduce"] = 2 * (self.copies - 1) / self.copies * trained / self.ranks
        return moved


@dataclass(frozen=True)
class Moment:
    """A moment of a step.

    Args:
        name: Name for tables.
        gradients: Bytes of gradients.
        activations: Bytes kept for backward.
        workspace: Bytes that only it needs.
        gathered: Bytes of parameters of other ranks.
    """

    name: str
    gradients: int
    activations: int
    workspace: int
    gathered: int = 0

    @property
    def total(self) -> int:
        """Bytes beside what is held all the time."""
        return self.gradients + self.activations + self.workspace + self.gathered


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank's device.

    Args:
        quantised: The base's codes and scales.
        dense: Other weights of the base.
        trained: float32 masters of adapters, and of embedding and head where they train.
        optimizer_states: States of the optimizer, moments mostly.
        gradients: All gradients at a step's end.
        activations: Activations kept at the end of forward.
        host: Pinned memory of activations kept on the host instead.
        logits_chunk: Logits that the loss holds at a time, in the workspace of its moment.
        decoded: Largest decoded weight, in the workspace of every layer.
        moments: Moments of a step, in order.
    """

    quantised: int
    dense: int
    trained: int
    optimizer_states: int
    gradients: int
    activations: int
    host: int
    logits_chunk: int
    decoded: int
    moments: tuple[Moment, ...]

    @property
    def held(self) -> int:
        """Bytes that are there all the time."""
        return self.quantised + self.dense + self.trained + self.optimizer_states

    @property
    def fullest(self) -> Moment:
        """The moment with the most bytes."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return self.held + self.fullest.total


@dataclass(frozen=True)
class Run:
    """Settings of a run that decide on its memory, beside the model.

    Args:
        batch: Shape of a micro-batch.
        modes: Activation checkpointing of each layer.
        device_type: ``cpu`` or ``cuda``.
        accumulates: A step has several micro-batches, so that gradients are there in each backward but one.
        optimizer: Bytes of the optimizer.
        sharing: Distribution of parameters over ranks.
        compares_with_base: The loss has `kl_to_base`; any row may hold tokens of its sources.
        keeps_start: A copy of what trains is kept in the compute dtype, and takes its place for a forward pass.
    """

    batch: MicroBatch
    modes: Sequence[str]
    device_type: str
    accumulates: bool
    optimizer: OptimizerMemory
    sharing: Sharing
    compares_with_base: bool = False
    keeps_start: bool = False


def plan_memory(model: nn.Module, run: Run) -> MemoryPlan:
    """Plan a run's memory.

    Args:
        model: A `MoeForCausalLM` or the PeftModel around it, whole (not sharded), on any device; on meta is enough.
        run: Settings of the run.
    """
    step, sizes, share = _Step(base_of(model), run), bytes_in_memory(model), run.sharing
    activations = step.activations
    return MemoryPlan(
        quantised=share.base(sizes["quantised"]),
        dense=share.base(sizes["dense"]),
        trained=share.trained(sizes["trainable"]) + step.start,
        optimizer_states=share.trained(run.optimizer.states),
        gradients=step.gradients,
        activations=activations.shared + sum(step.kept) + activations.tail,
        host=sum(_pinned(layer.host(mode)) for layer, mode in zip(activations.layers, run.modes, strict=True)),
        logits_chunk=activations.logits_chunk,
        decoded=activations.decoded,
        moments=tuple(step.moments()),
    )


class _Step:
    """Follows a step of one rank, from the second one on: forward still has the last step's gradients."""

    def __init__(self, base: Any, run: Run) -> None:
        self.run, self.base, self.layers, self.head = run, base, list(base.model.layers), base.lm_head
        self.activations = model_activations(base, run.batch, run.device_type)
        self.kept = [layer.kept(mode) for layer, mode in zip(self.activations.layers, run.modes, strict=True)]
        self.gradients = self._gradients(base)
        # Of each position that is compared with the base. The base's own pass comes first, when nothing is kept yet.
        states = run.batch.tokens * base.config.hidden_size * base.model.embed_tokens.output_dtype.itemsize
        self.compared = states if run.compares_with_base else 0
        trained = run.sharing.trained(_bytes(base, trained=True))
        self.start = trained * base.model.embed_tokens.output_dtype.itemsize // 4 if run.keeps_start else 0

    def moments(self) -> Iterator[Moment]:
        """Yield the moments of a step in order."""
        activations, run = self.activations, self.run
        if run.keeps_start:
            # The present values wait in float32 while the start is in their place; no layer keeps anything.
            present, work = run.sharing.trained(_bytes(self.base, trained=True)), activations.head
            yield Moment(
                "the reference",
                self.gradients,
                activations.shared + present,
                work,
                self._gathered(self.head, 1, forward=True),
            )
        kept = activations.shared + sum(self.kept)
        last, forward = self._gathered(self.layers[-1], forward=True), activations.layers[-1].forward(run.modes[-1])
        yield Moment("forward of the last layer", self.gradients, kept + self.compared, forward, last)
        tail = kept + activations.tail + self.compared
        gathered = self._gathered(self.head, 1, forward=True)
        yield Moment("loss", self.gradients, tail, activations.head, gathered)
        if self.compared:
            # The model's states and the gradients for them, beside those of the loss, and as many logits as the loss
            # holds where no kernel makes their gradient: three parts in float32 of a quarter of its chunk.
            work = activations.head + 3 * self.compared + activations.logits_chunk
            yield Moment("KL to the base", self.gradients, tail, work, gathered)
        there = self.gradients if run.accumulates else 0
        head = self._gathered(self.head, 1, forward=False)
        yield Moment("backward of the loss", there, tail, activations.head_backward, head)
        there += 0 if run.accumulates else self._gradients(self.head)
        for index in reversed(range(len(self.layers))):
            layer, own = self.layers[index], self._gradients(self.layers[index])
            work = activations.layers[index].backward(run.modes[index]) + self._reducing(layer)
            yield Moment(f"backward of layer {index + 1}", there, kept, work, self._gathered(layer, forward=False))
            kept -= self.kept[index]
            there += 0 if run.accumulates else own
        yield Moment("update", self.gradients, 0, run.sharing.trained(run.optimizer.workspace))

    def _gradients(self, module: Any) -> int:
        """Return the bytes of a module's gradients; FSDP keeps whole adapters' while micro-batches accumulate."""
        size, sharing = _bytes(module, trained=True), self.run.sharing
        return (size if self.run.accumulates else sharing.trained(size)) * (1 + sharing.gradient_copies)

    def _reducing(self, module: Any) -> int:
        """Return the bytes of a layer's gradients before they are reduced, and of the buffer they are sent from."""
        return 0 if self.run.sharing.kind == "whole" else 2 * _bytes(module, trained=True)

    def _gathered(self, module: Any, layers: int | None = None, *, forward: bool) -> int:
        frozen, trained = _bytes(module, trained=False), _bytes(module, trained=True)
        return self.run.sharing.gathered(frozen, trained, layers or len(self.layers), forward=forward)


def _pinned(size: int) -> int:
    """Return the bytes that torch pins for a tensor: the next power of two (CachingHostAllocator.h)."""
    return 1 << (size - 1).bit_length() if size else 0


def _bytes(module: nn.Module, trained: bool) -> int:
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad == trained)

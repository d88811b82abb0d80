"""The expert block for training on a GPU: expert by expert as `loop`, with fewer products and passes over memory.

LoRA is inside the large products: B is behind a decoded matrix's columns, and ``dropout(x) Aᵀ`` behind its rows', so
``[x | dropout(x) Aᵀ] [W | B]ᵀ`` is all of a projection, and gate and up are one product. In backward ``dy [W | B]`` is
the gradient of x and that of ``dropout(x) Aᵀ``. While one is computed, the next one's weights are decoded. SwiGLU,
gathering and summing are Triton's, with dropout that no mask is kept of. The factors come as their float32 masters:
each is cast where it is copied beside a matrix, and its gradient is written in float32.

Legend: T tokens, H hidden, I intermediate, E experts, K experts a token, S = T·K routed rows, n rows of one expert,
R LoRA rank of a product: gate's and up's side by side, or down's, and zeros up to a multiple of 8.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_mixcn.model.nf4.storage import NF4Weight, Weight

from .finish import finish, pending_output
from .loop import Dropout, ExpertFactors, ExpertWeights
from .routing import Routing, route_rows

if TYPE_CHECKING:  # its import needs Triton
    from lightning_mixcn.model.kernels.dropout import Drop

_EIGHT = 8  # a row of [W | B] is a multiple of 16 bytes, which tensor cores read at once, where W's is


class ExpertMasters(NamedTuple):
    """LoRA factors, α/r not in them, in any type; ``None`` where a projection has no adapter.

    Args:
        a_gate: ``[E, R_gate, H]``.
        b_gate: ``[E, I, R_gate]``.
        a_up: ``[E, R_up, H]``.
        b_up: ``[E, I, R_up]``.
        a_down: ``[E, R_down, I]``.
        b_down: ``[E, H, R_down]``.
    """

    a_gate: Tensor | None
    b_gate: Tensor | None
    a_up: Tensor | None
    b_up: Tensor | None
    a_down: Tensor | None
    b_down: Tensor | None


# α/r of gate, up and down.
Scales = tuple[float, float, float]


def fused_experts(
    x: Tensor, index: Tensor, weight: Tensor, weights: ExpertWeights, dropout: Dropout, *factors: Tensor | None
) -> Tensor:
    """Run the path with the arguments of `expert_loop`; `fused_loop` itself takes masters."""
    a_gate_up, b_gate, b_up, a_down, b_down = ExpertFactors(*factors)
    ranks = [0 if b is None else b.shape[2] for b in (b_gate, b_up)]
    a_gate, a_up = (None, None) if a_gate_up is None else torch.split(a_gate_up, ranks, dim=1)
    masters = ExpertMasters(
        None if b_gate is None else a_gate, b_gate, None if b_up is None else a_up, b_up, a_down, b_down
    )
    return fused_loop(x, index, weight, weights, dropout, (1.0, 1.0, 1.0), *masters)


class _Part(NamedTuple):
    """A projection in a product: its frozen weights, its masters, α/r, and the columns of its factors among R."""

    weight: Weight
    a: Tensor | None
    b: Tensor | None
    scale: float
    columns: slice


class _Product:
    """The large product of gate and up, or of down: frozen matrices one below the other, and their factors.

    Args:
        adapted: Of each projection, frozen weights, masters of A and B or ``None``, and α/r.
        dtype: Compute dtype.
    """

    def __init__(
        self, adapted: Sequence[tuple[Weight, Tensor | None, Tensor | None, float]], dtype: torch.dtype
    ) -> None:
        self.parts: list[_Part] = []
        rank = 0
        for weight, a, b, scale in adapted:
            stop = rank + (0 if a is None else a.shape[1])
            self.parts.append(_Part(weight, a, b, scale, slice(rank, stop)))
            rank = stop
        self.width, self.rank = adapted[0][0].shape[2], -(-rank // _EIGHT) * _EIGHT
        self.a = self._cast_a(rank, dtype) if rank else None

    def _cast_a(self, rank: int, dtype: torch.dtype) -> Tensor:
        """Return all As ``[E, R, in]`` in the compute dtype."""
        weight = self.parts[0].weight
        masters = [(part.a, part.columns) for part in self.parts if part.a is not None]
        found = masters[0][0].new_empty(weight.shape[0], self.rank, self.width, dtype=dtype)
        for a, columns in masters:
            found[:, columns].copy_(a)
        if rank < self.rank:
            found[:, rank:].zero_()
        return found

    def new_operand(self, like: Tensor) -> Tensor:
        """Return memory for ``[W | B]``, ``[out, in + R]``."""
        return like.new_empty(sum(part.weight.shape[1] for part in self.parts), self.width + self.rank)

    def decode(self, expert: int, out: Tensor) -> None:
        """Write one expert's ``[W | B]``."""
        outs = torch.split(out, [part.weight.shape[1] for part in self.parts])
        for (weight, _, b, scale, columns), rows in zip(self.parts, outs, strict=True):
            _write_operand(weight, expert, rows, None if b is None else b[expert], scale, self.width + columns.start)

    def multiply_a(self, expert: int, wide: Tensor, dropped: Tensor | None) -> Tensor:
        """Write ``dropout(rows) Aᵀ`` behind the columns of the rows ``wide [n, in + R]``, and return these columns."""
        hidden_nR = wide[:, self.width :]
        if self.a is not None:
            torch.mm(wide[:, : self.width] if dropped is None else dropped, self.a[expert].t(), out=hidden_nR)
        return hidden_nR

    def scaled_hidden(self, expert: int, dropped: Tensor) -> Tensor:
        """Return ``dropped Aᵀ`` as the gradient of B needs it, scaled with α/r; of a product of one projection."""
        assert self.a is not None
        (part,) = self.parts
        hidden_nR = dropped.new_empty(len(dropped), self.rank)
        return hidden_nR.addmm_(dropped, self.a[expert].t(), beta=0.0, alpha=part.scale)

    def through_a(self, expert: int, dwide: Tensor, dropped: Tensor | None) -> None:
        """Take the gradient that comes through A, from that of ``wide``.

        Args:
            expert: Number of the expert.
            dwide: ``[n, in + R]``; without dropout, what comes through A is added to the columns of the rows.
            dropped: ``[n, in]`` for what comes to the dropped rows, if rows are dropped.
        """
        if self.a is None:
            return
        if dropped is None:
            dwide[:, : self.width].addmm_(dwide[:, self.width :], self.a[expert])
        else:
            torch.mm(dwide[:, self.width :], self.a[expert], out=dropped)

    def scaled(self, hidden_SR: Tensor) -> Tensor:
        """Return ``hidden`` as the gradients of B need it, scaled with α/r."""
        factors = hidden_SR.new_ones(self.rank, dtype=torch.float32)
        for part in self.parts:
            factors[part.columns] = part.scale
        return (hidden_SR * factors).to(hidden_SR.dtype)


class _Gradients:
    """Gradients of a product's masters, in their dtype, written expert by expert."""

    def __init__(self, product: _Product) -> None:
        self._product = product
        a = next((part.a for part in product.parts if part.a is not None), None)
        self._a = None if a is None else a.new_empty(len(a), product.rank, product.width)
        self._b = [None if part.b is None else torch.empty_like(part.b) for part in product.parts]

    def write(self, expert: int, dy: Tensor, hidden: Tensor, dwide: Tensor, dropped: Tensor | None) -> None:
        """Write one expert's.

        Args:
            expert: Number of the expert.
            dy: ``[n, out]``, the gradient of the product.
            hidden: ``[n, R]``, scaled with α/r.
            dwide: ``[n, in + R]``, the gradient of ``[rows | dropout(rows) Aᵀ]``.
            dropped: ``[n, in]``, the dropped rows, scaled as ``dy`` is.
        """
        if self._a is None or dropped is None:
            return
        _multiply_into(self._a[expert], dwide[:, self._product.width :].t(), dropped)
        dys = torch.split(dy, [part.weight.shape[1] for part in self._product.parts], dim=1)
        for part, db, part_dy in zip(self._product.parts, self._b, dys, strict=True):
            if db is not None:
                _multiply_into(db[expert], part_dy.t(), hidden[:, part.columns])

    def of_masters(self, experts: list[int]) -> Iterator[Tensor | None]:
        """Yield the gradients of each projection's A and B; 0 for all but ``experts``."""
        for gradient in (self._a, *self._b):
            for expert in set(range(0 if gradient is None else len(gradient))).difference(experts):
                assert gradient is not None
                gradient[expert].zero_()
        for part, db in zip(self._product.parts, self._b, strict=True):
            yield None if self._a is None or db is None else self._a[:, part.columns]
            yield db


def _multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write ``left right``, whose sums are float32, without rounding them to the operands' dtype first."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif left.device.type == "cpu":  # where torch has no product with another type of result
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _gate_up(weights: ExpertWeights, scales: Scales, masters: ExpertMasters, dtype: torch.dtype) -> _Product:
    gate = weights[0], masters.a_gate, masters.b_gate, scales[0]
    return _Product([gate, (weights[1], masters.a_up, masters.b_up, scales[1])], dtype)


def _down(weights: ExpertWeights, scales: Scales, masters: ExpertMasters, dtype: torch.dtype) -> _Product:
    return _Product([(weights[2], masters.a_down, masters.b_down, scales[2])], dtype)


def _write_operand(weight: Weight, index: int, out: Tensor, b: Tensor | None, scale: float, column: int) -> None:
    """Write ``[W | B]``: B scaled, from ``column`` on, and zeros beside it."""
    if isinstance(weight, NF4Weight):
        from lightning_mixcn.model.kernels.operand import decode_operand

        decode_operand(weight.packed(), weight.shape, index, out, b, scale, column)
        return
    width = weight.shape[2]
    out[:, :width].copy_(weight.decoder(out.dtype)(index))
    out[:, width:].zero_()
    if b is not None:
        torch.mul(b, scale, out=out[:, column : column + b.shape[1]])


class _Operands:
    """Decoded operands of a sequence of products, each decoded on a stream of its own while the one before is computed.

    Two buffers take turns, and a buffer is overwritten when its last reader has been enqueued before.
    The stream waits for whatever is enqueued when a decoding is asked for, and every decoding is waited for before its
    product; so memory and weights that only the main stream knows are safe without `record_stream`.

    Args:
        order: Products and experts: of one product, or of two in turns.
        like: Tensor of the device and dtype.
    """

    def __init__(self, order: list[tuple[_Product, int]], like: Tensor) -> None:
        self._order, self._next = order, 0
        self._buffers = [product.new_operand(like) for product, _ in order[:2]]
        self._stream = _decoding_stream(like.device) if like.is_cuda else None
        self._events: list[torch.cuda.Event] = []
        if order:
            self._decode(0)

    def take(self, product: _Product) -> Tensor:
        """Return the next operand, whose product the caller enqueues before it takes another."""
        step, self._next = self._next, self._next + 1
        assert self._order[step][0] is product
        if self._next < len(self._order):
            self._decode(self._next)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._events[step])
        return self._buffers[step % 2]

    def _decode(self, step: int) -> None:
        product, expert = self._order[step]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            product.decode(expert, self._buffers[step % 2])
            if self._stream is not None:
                self._events.append(self._stream.record_event())


@cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def fused_loop(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    weights: ExpertWeights,
    dropout: Dropout,
    scales: Scales,
    *masters: Tensor | None,
) -> Tensor:
    """Compute the block by the path ``fused``.

    Args:
        x: ``[T, H]`` in the compute dtype.
        index: ``[T, K]`` int64, the chosen experts.
        weight: ``[T, K]``, their routing weights; float32 or the compute dtype.
        weights: Frozen weights.
        dropout: LoRA dropout; the mask of a token's row depends on the token, the expert and the seed.
        scales: α/r of gate, up and down.
        masters: The six tensors of `ExpertMasters`.

    Returns:
        ``[T, H]`` in the dtype of ``x``: Σₖ weight · down(silu(gate x) ⊙ up x).
    """
    return finish(*_FusedLoop.apply(x, index, weight, weights, dropout, scales, *masters))  # type: ignore[no-untyped-call]  # torch leaves apply untyped


class _FusedLoop(torch.autograd.Function):
    """All but the output, see `finish`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        weight: Tensor,
        weights: ExpertWeights,
        dropout: Dropout,
        scales: Scales,
        *masters: Tensor | None,
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Compute gate and up."""
        from lightning_mixcn.model.kernels.dropout import drop_arguments
        from lightning_mixcn.model.kernels.rows import gather_rows

        x, drop = x.contiguous(), drop_arguments(*dropout)
        product = _gate_up(weights, scales, ExpertMasters(*masters), x.dtype)
        routing = route_rows(index, weights[0].shape[0], padded=False)
        rows_S, experts = len(routing.token), list(routing.experts())
        gate_up_S2I = x.new_empty(rows_S, weights[0].shape[1] + weights[1].shape[1])
        hidden_SR = x.new_empty(rows_S, product.rank)
        operands = _Operands([(product, expert) for expert, _ in experts], x)
        for expert, rows in experts:
            token = routing.token[rows]
            wide, dropped = _rows_of(product, len(token), x, drop.threshold > 0)
            gather_rows(x, token, wide[:, : product.width], dropped, drop)
            hidden_SR[rows] = product.multiply_a(expert, wide, dropped)
            torch.mm(wide, operands.take(product).t(), out=gate_up_S2I[rows])
            del wide, dropped
        ctx.weights, ctx.scales, ctx.drop, ctx.offsets = weights, scales, drop, routing.offsets
        ctx.save_for_backward(x, weight, gate_up_S2I, hidden_SR, routing.token, routing.row, *masters)
        return pending_output(x), partial(_output, gate_up_S2I, routing, weight, weights, drop, scales, masters)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the routing weights and the masters."""
        from lightning_mixcn.model.kernels.dropout import COLUMNS
        from lightning_mixcn.model.kernels.expert_swiglu import expert_swiglu_backward
        from lightning_mixcn.model.kernels.rows import gather_rows, sum_rows

        x, weight_TK, gate_up_S2I, hidden_SR, token_S, row_TK, *masters = ctx.saved_tensors
        operands_of = ctx.weights, ctx.scales, ExpertMasters(*masters), x.dtype
        gate_up, down = _gate_up(*operands_of), _down(*operands_of)
        dgate_up, ddown = _Gradients(gate_up), _Gradients(down)
        grad_TH, rows_S = grad_TH.contiguous(), len(token_S)
        weight_S = x.new_empty(rows_S, dtype=torch.float32)
        weight_S.index_copy_(0, row_TK.flatten(), weight_TK.flatten().float())
        hidden_SR = gate_up.scaled(hidden_SR)
        dweight_S = x.new_empty(rows_S, -(-down.width // COLUMNS), dtype=torch.float32)
        dx_SH = x.new_empty(rows_S, gate_up.width + gate_up.rank)
        drops, wants_dx = ctx.drop.threshold > 0, ctx.needs_input_grad[0]
        dx_dropped_SH = x.new_empty(rows_S, gate_up.width) if gate_up.rank and drops else None
        experts = list(Routing(token_S, row_TK, ctx.offsets).experts())
        operands = _Operands([(product, expert) for expert, _ in experts for product in (down, gate_up)], x)
        for expert, rows in experts:
            token = token_S[rows]
            dy_nH = x.new_empty(len(token), x.shape[1])
            gather_rows(grad_TH, token, dy_nH, None, ctx.drop)
            dh = torch.mm(dy_nH, operands.take(down))
            dh_dropped = x.new_empty(len(token), down.width) if down.rank and drops else None
            down.through_a(expert, dh, dh_dropped)
            dy_n2I, dropped = expert_swiglu_backward(
                gate_up_S2I[rows], dh[:, : down.width], dh_dropped, weight_S[rows], token, expert, ctx.drop,
                dweight_S[rows], adapted=down.rank > 0,
            )  # fmt: skip
            if dropped is not None:
                # Made again: saved, it would have recomputation run until there is h. It has the routing weight of h.
                ddown.write(expert, dy_nH, down.scaled_hidden(expert, dropped), dh, dropped)
            del dy_nH, dh, dh_dropped, dropped
            dx_nH = torch.mm(dy_n2I, operands.take(gate_up), out=dx_SH[rows])
            if gate_up.rank:
                x_nH = x.new_empty(len(token), gate_up.width)
                gather_rows(x, token, None, x_nH, ctx.drop)
                dgate_up.write(expert, dy_n2I, hidden_SR[rows], dx_nH, x_nH)
                if wants_dx:
                    gate_up.through_a(expert, dx_nH, None if dx_dropped_SH is None else dx_dropped_SH[rows])
                del x_nH
            del dy_n2I
        used = [expert for expert, _ in experts]
        dx = sum_rows(dx_SH[:, : gate_up.width], row_TK, None, dx_dropped_SH, ctx.drop) if wants_dx else None
        dweight = dweight_S.sum(1)[row_TK].to(weight_TK.dtype)
        return dx, None, dweight, None, None, None, *dgate_up.of_masters(used), *ddown.of_masters(used)


def _output(
    gate_up_S2I: Tensor,
    routing: Routing,
    weight_TK: Tensor,
    weights: ExpertWeights,
    drop: "Drop",
    scales: Scales,
    masters: tuple[Tensor | None, ...],
) -> Tensor:
    """Compute the output ``[T, H]`` from gate and up."""
    from lightning_mixcn.model.kernels.expert_swiglu import expert_swiglu
    from lightning_mixcn.model.kernels.rows import sum_rows

    product = _down(weights, scales, ExpertMasters(*masters), gate_up_S2I.dtype)
    experts = list(routing.experts())
    y_SH = gate_up_S2I.new_empty(len(gate_up_S2I), weights[2].shape[1])
    operands = _Operands([(product, expert) for expert, _ in experts], y_SH)
    for expert, rows in experts:
        token = routing.token[rows]
        wide, dropped = _rows_of(product, len(token), y_SH, drop.threshold > 0)
        expert_swiglu(gate_up_S2I[rows], token, expert, drop, wide[:, : product.width], dropped)
        product.multiply_a(expert, wide, dropped)
        torch.mm(wide, operands.take(product).t(), out=y_SH[rows])
        del wide, dropped
    return sum_rows(y_SH, routing.row, weight_TK)


def _rows_of(product: _Product, count: int, like: Tensor, drops: bool) -> tuple[Tensor, Tensor | None]:
    """Return memory for ``count`` rows ``[n, in + R]``, and for dropped rows ``[n, in]`` if there are."""
    wide = like.new_empty(count, product.width + product.rank)
    return wide, like.new_empty(count, product.width) if drops and product.rank else None

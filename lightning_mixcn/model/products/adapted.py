"""A large product with LoRA inside: ``[x | dropout(x) Aᵀ] [W | B]ᵀ = x Wᵀ + dropout(x) Aᵀ Bᵀ``.

B is behind a decoded matrix's columns, and ``dropout(x) Aᵀ`` behind its rows'. Projections that read the same rows are
one product. In backward ``dy [W | B]`` is the gradient of x and that of ``dropout(x) Aᵀ``. The factors come as their
float32 masters: each is cast where it is copied beside a matrix, and its gradient is written in float32.

Legend: E matrices of a stack (experts, or 1), C those of them with factors, n rows, R LoRA rank of a product: its
projections' side by side, and zeros up to a multiple of 8.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mixcn.model.nf4.storage import NF4Weight, Weight

_EIGHT = 8  # a row of [W | B] is a multiple of 16 bytes, which tensor cores read at once, where W's is


class _Part(NamedTuple):
    """A projection in a product: its frozen weights, its masters, α/r, and the columns of its factors among R."""

    weight: Weight
    a: Tensor | None
    b: Tensor | None
    scale: float
    columns: slice


class AdaptedProduct:
    """Projections of the same rows as one product: frozen matrices one below the other, and their factors.

    Args:
        adapted: Of each projection, frozen weights, masters of A and B or ``None``, and α/r.
        dtype: Compute dtype.
        slots: Number of each matrix that has factors → its place among them; ``None`` for all. The products of the
            others are without LoRA.
    """

    def __init__(
        self,
        adapted: Sequence[tuple[Weight, Tensor | None, Tensor | None, float]],
        dtype: torch.dtype,
        slots: Mapping[int, int] | None = None,
    ) -> None:
        self._slots = slots
        self.parts: list[_Part] = []
        rank = 0
        for weight, a, b, scale in adapted:
            stop = rank + (0 if a is None else a.shape[1])
            self.parts.append(_Part(weight, a, b, scale, slice(rank, stop)))
            rank = stop
        self.width, self.rank = adapted[0][0].shape[2], -(-rank // _EIGHT) * _EIGHT
        self.a = self._cast_a(rank, dtype) if rank else None

    def slot(self, expert: int) -> int | None:
        """Return the place of an expert's factors; ``None`` if it has none."""
        if self.a is None:
            return None
        return expert if self._slots is None else self._slots.get(expert)

    def columns(self, expert: int) -> int:
        """Return the width of an expert's rows: in + R, or in for one without factors."""
        return self.width if self.slot(expert) is None else self.width + self.rank

    def _cast_a(self, rank: int, dtype: torch.dtype) -> Tensor:
        """Return all As ``[C, R, in]`` in the compute dtype."""
        masters = [(part.a, part.columns) for part in self.parts if part.a is not None]
        found = masters[0][0].new_empty(len(masters[0][0]), self.rank, self.width, dtype=dtype)
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
        outs, slot = torch.split(out, [part.weight.shape[1] for part in self.parts]), self.slot(expert)
        for (weight, _, b, scale, columns), rows in zip(self.parts, outs, strict=True):
            own = None if b is None or slot is None else b[slot]
            _write_operand(weight, expert, rows, own, scale, self.width + columns.start)

    def multiply_a(self, expert: int, wide: Tensor, dropped: Tensor | None) -> Tensor:
        """Write ``dropout(rows) Aᵀ`` behind the columns of the rows ``wide [n, in + R]``, and return these columns."""
        hidden_nR = wide[:, self.width :]
        if self.a is not None and (slot := self.slot(expert)) is not None:
            torch.mm(wide[:, : self.width] if dropped is None else dropped, self.a[slot].t(), out=hidden_nR)
        return hidden_nR

    def scaled_hidden(self, expert: int, dropped: Tensor) -> Tensor:
        """Return ``dropped Aᵀ`` as the gradient of B needs it, scaled with α/r; of a product of one projection."""
        slot = self.slot(expert)
        assert self.a is not None
        assert slot is not None
        (part,) = self.parts
        hidden_nR = dropped.new_empty(len(dropped), self.rank)
        return hidden_nR.addmm_(dropped, self.a[slot].t(), beta=0.0, alpha=part.scale)

    def through_a(self, expert: int, dhidden: Tensor, dx: Tensor, dropped: Tensor | None) -> None:
        """Take the gradient that comes through A.

        Args:
            expert: Number of the expert.
            dhidden: ``[n, R]``, the gradient of ``dropout(rows) Aᵀ``.
            dx: ``[n, in]``, that of the rows; without dropout, what comes through A is added.
            dropped: ``[n, in]`` for what comes to the dropped rows, if rows are dropped.
        """
        slot = self.slot(expert)
        if self.a is None or slot is None:
            return
        if dropped is None:
            dx.addmm_(dhidden, self.a[slot])
        else:
            torch.mm(dhidden, self.a[slot], out=dropped)

    def scaled(self, hidden_SR: Tensor) -> Tensor:
        """Return ``hidden`` as the gradients of B need it, scaled with α/r."""
        factors = hidden_SR.new_ones(self.rank, dtype=torch.float32)
        for part in self.parts:
            factors[part.columns] = part.scale
        return (hidden_SR * factors).to(hidden_SR.dtype)


class FactorGradients:
    """Gradients of a product's masters, in their dtype, written expert by expert."""

    def __init__(self, product: AdaptedProduct) -> None:
        self._product = product
        a = next((part.a for part in product.parts if part.a is not None), None)
        self._a = None if a is None else a.new_empty(len(a), product.rank, product.width)
        self._b = [None if part.b is None else torch.empty_like(part.b) for part in product.parts]

    def write(self, expert: int, dy: Tensor, hidden: Tensor, dhidden: Tensor, dropped: Tensor | None) -> None:
        """Write one expert's.

        Args:
            expert: Number of the expert.
            dy: ``[n, out]``, the gradient of the product.
            hidden: ``[n, R]``, scaled with α/r.
            dhidden: ``[n, R]``, the gradient of ``dropout(rows) Aᵀ``.
            dropped: ``[n, in]``, the dropped rows, scaled as ``dy`` is.
        """
        slot = self._product.slot(expert)
        if self._a is None or slot is None or dropped is None:
            return
        _multiply_into(self._a[slot], dhidden.t(), dropped)
        dys = torch.split(dy, [part.weight.shape[1] for part in self._product.parts], dim=1)
        for part, db, part_dy in zip(self._product.parts, self._b, dys, strict=True):
            if db is not None:
                _multiply_into(db[slot], part_dy.t(), hidden[:, part.columns])

    def of_masters(self, experts: list[int]) -> Iterator[Tensor | None]:
        """Yield the gradients of each projection's A and B; 0 for all but ``experts``."""
        written = {self._product.slot(expert) for expert in experts}
        for gradient in (self._a, *self._b):
            for slot in set(range(0 if gradient is None else len(gradient))).difference(written):
                assert gradient is not None
                gradient[slot].zero_()
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


class Operands:
    """Decoded operands of a sequence of products, each decoded on a stream of its own while the one before is computed.

    Two buffers take turns, and a buffer is overwritten when its last reader has been enqueued before.
    The stream waits for whatever is enqueued when a decoding is asked for, and every decoding is waited for before its
    product; so memory and weights that only the main stream knows are safe without `record_stream`.

    Args:
        order: Products and experts: of one product, or of two in turns.
        like: Tensor of the device and dtype.
    """

    def __init__(self, order: list[tuple[AdaptedProduct, int]], like: Tensor) -> None:
        self._order, self._next = order, 0
        self._buffers = [product.new_operand(like) for product, _ in order[:2]]
        self._stream = _decoding_stream(like.device) if like.is_cuda else None
        self._events: list[torch.cuda.Event] = []
        if order:
            self._decode(0)

    def take(self, product: AdaptedProduct) -> Tensor:
        """Return the next operand ``[out, columns]``, whose product the caller enqueues before it takes another."""
        step, self._next = self._next, self._next + 1
        ordered, expert = self._order[step]
        assert ordered is product
        if self._next < len(self._order):
            self._decode(self._next)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._events[step])
        return self._buffers[step % 2][:, : product.columns(expert)]

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

"""Decoding the next matrix on a second CUDA stream while the present one is multiplied.

Decoding is bound by memory and a product by arithmetic, so on a GPU both can go on at once. Two buffers take turns.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Writes a matrix into a flat buffer, on the current stream, and gives it: a view of the buffer.
Decode = Callable[[Tensor], Tensor]


class DecodeAhead:
    """Gives matrices in an order that is known beforehand; each is valid until the next one is taken.

    Decode j + 1 waits for all that the current stream was told before `take` j, so for product j − 1, which read the
    buffer that it writes to; product j waits for decode j. Nothing else is ordered, and no host waits.

    Args:
        decodes: One for each `take` to come. What they read must be there on the current stream, and stay.
        numel: Elements of the largest matrix.
        like: Dtype and device of the matrices.
        stream: The second stream; ``None`` (any device but CUDA) decodes in place, still one ahead.
    """

    def __init__(
        self, decodes: Sequence[Decode], numel: int, like: Tensor, stream: "torch.cuda.Stream | None" = None
    ) -> None:
        self._decodes, self._stream = decodes, stream
        self._buffers = [like.new_empty(numel) for _ in range(2)]
        if stream is not None:
            for buffer in self._buffers:  # should an error leave a decode behind that nobody has waited for
                buffer.record_stream(stream)
        self._taken = 0
        self._next = self._start(0)

    def take(self) -> Tensor:
        """The next matrix."""
        matrix, done = self._next
        self._taken += 1
        if self._taken < len(self._decodes):
            self._next = self._start(self._taken)
        if done is not None:
            torch.cuda.current_stream(matrix.device).wait_event(done)
        return matrix

    def _start(self, number: int) -> "tuple[Tensor, torch.cuda.Event | None]":
        buffer = self._buffers[number % 2]
        if self._stream is None:
            return self._decodes[number](buffer), None
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(self._stream):
            return self._decodes[number](buffer), self._stream.record_event()

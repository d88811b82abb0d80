"""The next matrix is decoded early enough to overlap, and never too early."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mixcn.model.decode_ahead import DecodeAhead


def fill(number: int, buffer: Tensor) -> Tensor:
    return buffer[: 6 - number % 2].fill_(number)


def test_a_matrix_stays_until_the_next_is_taken() -> None:
    """On the CPU a decode is done at once: before the matrix in front of it is used."""
    ahead = DecodeAhead([partial(fill, number) for number in range(7)], 6, torch.empty(0, dtype=torch.float64))
    assert [ahead.take().tolist() for _ in range(7)] == [[number] * (6 - number % 2) for number in range(7)]


def test_each_is_decoded_once_and_only_one_ahead() -> None:
    decoded: list[int] = []

    def decode(number: int, buffer: Tensor) -> Tensor:
        decoded.append(number)
        return buffer

    ahead = DecodeAhead([partial(decode, number) for number in range(3)], 1, torch.empty(0))
    seen = []
    for _ in range(3):
        ahead.take()
        seen.append(list(decoded))
    assert seen == [[0, 1], [0, 1, 2], [0, 1, 2]]


class Stream:
    """A CUDA stream as far as order goes: what is certainly done before the next thing that it is told."""

    def __init__(self) -> None:
        self.done: set[str] = set()

    def wait_stream(self, other: "Stream") -> None:
        self.done |= other.done

    def record_event(self) -> set[str]:
        return set(self.done)

    def wait_event(self, event: set[str]) -> None:
        self.done |= event


def test_the_order_that_streams_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    main, side = Stream(), Stream()
    current = [main]

    @contextmanager
    def switched(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", switched)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)

    def decode(number: int, buffer: Tensor) -> Tensor:
        assert current[-1] is side
        # The product that read this buffer is over; the one that reads the other buffer need not be: they overlap.
        assert number < 2 or f"product {number - 2}" in side.done
        assert f"product {number - 1}" not in side.done
        side.done.add(f"decode {number}")
        return buffer

    main.done.add("codes")
    unordered: Any = side
    ahead = DecodeAhead([partial(decode, number) for number in range(5)], 1, torch.empty(0), unordered)
    assert "codes" in side.done
    for number in range(5):
        ahead.take()
        assert f"decode {number}" in main.done
        assert f"decode {number + 1}" not in main.done
        main.done.add(f"product {number}")
    # The buffers go back to the main stream, which is behind every decode.
    assert {f"decode {number}" for number in range(5)} <= main.done


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["decode", "product", "neither"])
def test_on_a_gpu(slow: str) -> None:
    """Whichever stream lags, every product meets its own matrix."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")

    def decode(number: int, buffer: Tensor) -> Tensor:
        if slow == "decode":
            torch.cuda._sleep(1_000_000)
        return buffer.fill_(number).view(256, 256)

    rows = torch.ones(64, 256, device="cuda")
    ahead = DecodeAhead([partial(decode, number) for number in range(40)], 2**16, rows, torch.cuda.Stream())
    products = []
    for _ in range(40):
        matrix = ahead.take()
        if slow == "product":
            torch.cuda._sleep(1_000_000)
        products.append(rows @ matrix)
    assert torch.stack(products)[:, 0, 0].tolist() == [256.0 * number for number in range(40)]

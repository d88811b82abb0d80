"""Dropout without a mask in memory: what is dropped is a function of (seed, stream, token, column) alone.

The function is Philox 4x32 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405): the same in forward, in
backward and when activations are computed again, whatever the order and the number of rows. One call gives four
numbers, which go to columns `RUN` apart, so that neighbouring threads still read neighbouring columns.
"""

from typing import NamedTuple

import triton
import triton.language as tl

RUN = 128  # columns between the four numbers of one call
COLUMNS = 4 * RUN  # columns that a program takes: all numbers of its calls


class Drop(NamedTuple):
    """Arguments of the kernels that drop.

    Args:
        seed: Key of the random numbers, below 2³¹.
        threshold: Numbers of 31 bits below it are dropped.
        scale: Factor of what is kept, 1/(1-p).
    """

    seed: int
    threshold: int
    scale: float


def drop_arguments(probability: float, seed: int) -> Drop:
    """Return a kernel's arguments for a probability in [0, 1), which is rounded to a multiple of 2⁻³¹."""
    threshold = min(round(probability * 2**31), 2**31 - 1)
    return Drop(seed, threshold, 1.0 / (1.0 - threshold / 2**31))


@triton.jit
def random_words(seed, stream, token, tile, RUN: tl.constexpr):
    """Return four random tensors ``[rows, RUN]`` uint32 for columns ``(4 tile + word) RUN + [0, RUN)``.

    ``token`` is ``[rows]``; ``stream`` tells one mask from another of the same seed: 0 for the block's input, 1 + e for
    expert e's hidden rows (a token goes to an expert once).
    """
    lane = (tile * RUN + tl.arange(0, RUN)).to(tl.uint32)[None, :]
    token = token.to(tl.uint32)[:, None]
    lane, token = tl.broadcast(lane, token)
    zero = lane * 0
    return tl.philox(seed, lane, token, zero + stream.to(tl.uint32), zero)


@triton.jit
def kept(words, threshold, scale):
    """Return the factors 0 or ``scale`` of random words."""
    return tl.where((words >> 1).to(tl.int32) >= threshold, scale, 0.0)

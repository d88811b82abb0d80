"""Dropout masks written out with Philox 4x32-10 of Salmon et al. 2011, figure 4 of the paper and its constants."""

import numpy as np
import torch
from torch import Tensor

_LOW = np.uint64(0xFFFFFFFF)


def philox(counter: list[np.ndarray], key: list[int]) -> list[np.ndarray]:
    """Encrypt four arrays of 32-bit counters, held as uint64, with ten rounds."""
    words, (low, high) = [np.asarray(part, dtype=np.uint64) & _LOW for part in counter], map(np.uint64, key)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [
            (second >> np.uint64(32)) ^ words[1] ^ low, second & _LOW,
            (first >> np.uint64(32)) ^ words[3] ^ high, first & _LOW,
        ]  # fmt: skip
        low, high = (low + np.uint64(0x9E3779B9)) & _LOW, (high + np.uint64(0xBB67AE85)) & _LOW
    return words


def dropout_mask(tokens: Tensor, width: int, probability: float, seed: int, stream: int) -> Tensor:
    """Return the factors 0 or 1/(1-p) ``[n, width]`` of tokens' rows, float64."""
    column = np.arange(width)
    # Four numbers a call, which belong to runs of 128 columns.
    call, word = (column // 512) * 128 + column % 128, column // 128 % 4
    number = np.broadcast_to(tokens.cpu().numpy()[:, None], (len(tokens), width))
    lane, zero = np.broadcast_to(call, number.shape), np.zeros(number.shape)
    words = np.stack(philox([lane, number, zero + stream, zero], [seed, 0]))
    drawn = np.take_along_axis(words, np.broadcast_to(word, number.shape)[None], 0)[0]
    threshold = round(probability * 2**31)
    return torch.from_numpy((drawn >> np.uint64(1)) >= threshold).double() / (1 - threshold / 2**31)

"""Pseudo-random permutations of any size that need no memory: place in, index out."""

from __future__ import annotations

import hashlib

_ROUNDS = 8
_MASK = 2**64 - 1


class Permutation:
    """A permutation of ``0 … size - 1`` that is computed place by place.

    An alternating Feistel network over the next power of two, at least 16, walked until it lands inside (Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): fewer than two steps on average for more than 16 places.
    Shuffling a hundred million documents thus takes no table of a hundred million places, in no process.

    Args:
        size: How many places, at least 1.
        key: What the permutation is derived from.
    """

    def __init__(self, size: int, key: str) -> None:
        """Derive the rounds' keys."""
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[start : start + 8], "little") for start in range(0, len(digest), 8)]
        self._size = size
        bits = max(4, (size - 1).bit_length())
        self._low_bits = bits // 2
        self._low, self._high = (1 << self._low_bits) - 1, (1 << (bits - self._low_bits)) - 1

    def __getitem__(self, place: int) -> int:
        """Index at `place`, which is at least 0 and less than the size."""
        index = self._step(place)
        while index >= self._size:
            index = self._step(index)
        return index

    def _step(self, value: int) -> int:
        high, low = value >> self._low_bits, value & self._low
        for number, key in enumerate(self._keys):
            if number % 2:
                high ^= _mix(low + key) & self._high
            else:
                low ^= _mix(high + key) & self._low
        return high << self._low_bits | low


def _mix(value: int) -> int:
    """SplitMix64's output function (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators")."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)

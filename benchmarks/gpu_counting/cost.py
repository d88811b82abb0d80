"""Seconds of counted work on a card, from rates that are given: arithmetic, no measurement."""

import math
from dataclasses import dataclass

from .trace import Work

# Rows and columns of cuBLAS' tiles, and the share of the card's rate that tiles of the size reach.
_TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.88, (64, 128): 0.6, (64, 64): 0.35}
_LEAST_SPLIT = 256  # of a product's inner size
_SPLIT_S = 2e-6  # adding up what a split product's parts are
_START_S = 3e-6  # a product's first loads and last stores, when nothing else runs


@dataclass(frozen=True)
class Rates:
    """What a card does in a second; the defaults are those stated for an H100.

    Args:
        tflops: 10¹² operations a second of large products in bfloat16, when every multiprocessor has a tile.
        attention_tflops: The same of attention's kernel (FlashAttention-2).
        decoding_tflops: The same of the Triton kernel that multiplies with 4-bit weights.
        terabytes: 10¹² bytes a second of the card's memory.
        host_gigabytes: 10⁹ bytes a second between the card and the host.
        multiprocessors: Tiles that are computed at a time.
        launch_microseconds: Of the host, for a kernel.
    """

    tflops: float = 760.0
    attention_tflops: float = 350.0
    decoding_tflops: float = 135.0
    terabytes: float = 2.7
    host_gigabytes: float = 50.0
    multiprocessors: int = 132
    launch_microseconds: float = 7.0

    def seconds(self, work: Work) -> float:
        """Return the time of one kernel."""
        moving = work.bytes / (self.terabytes * 1e12)
        if work.kind == "host copy":
            return work.bytes / (self.host_gigabytes * 1e9)
        if work.kind == "attention":
            return max(moving, work.flops / (self.attention_tflops * 1e12))
        if not work.shape:
            return moving
        if work.name == "nf4_product":
            return max(moving, work.flops / (self.decoding_tflops * 1e12))
        return max(moving, self.product_seconds(*work.shape)) + _START_S

    def product_seconds(self, m: int, k: int, n: int, groups: int) -> float:
        """Return the arithmetic's time of ``groups`` products: whole waves of tiles, the best size of them."""
        return min(self._tiled(tile, share, m, k, n, groups) for tile, share in _TILES.items())

    def _tiled(self, tile: tuple[int, int], share: float, m: int, k: int, n: int, groups: int) -> float:
        tiles = groups * math.ceil(m / tile[0]) * math.ceil(n / tile[1])
        # Fewer tiles than multiprocessors: each is split along the inner size.
        parts = max(1, min(self.multiprocessors // tiles, k // _LEAST_SPLIT))
        waves = math.ceil(tiles * parts / self.multiprocessors)
        rate = self.tflops * 1e12 / self.multiprocessors * share
        return waves * 2 * tile[0] * tile[1] * k / parts / rate + (_SPLIT_S if parts > 1 else 0.0)

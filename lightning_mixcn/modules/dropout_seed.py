"""Random numbers of dropout: a function of the micro-batch's place in the run, so a checkpoint need not hold them.

A resumed run draws what an uninterrupted one would, however often either validates or samples.
"""

import hashlib

import torch


def micro_batch_seed(seed: int, index: int, rank: int) -> int:
    """Seed of a micro-batch.

    Args:
        seed: Of the run.
        index: Micro-batches of this rank before it, since the run began.
        rank: This rank.

    Returns:
        63 bits that do not resemble those of another place.
    """
    digest = hashlib.blake2b(f"{seed}/{index}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_micro_batch(seed: int, index: int, rank: int) -> None:
    """Set torch's random numbers, of the CPU and of every accelerator, for one micro-batch; see `micro_batch_seed`."""
    torch.manual_seed(micro_batch_seed(seed, index, rank))

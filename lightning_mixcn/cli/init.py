"""The subcommand ``init``: the first YAML of a run on a base, a machine and texts of one's own."""

from lightning_mixcn.arguments import Name


def init(
    *,
    base: Name,
    text: list[Name] | None = None,
    instruct: list[Name] | None = None,
    gpu: Name | None = None,
    out: Name,
) -> None:
    """Write a commented YAML that fits, after a look at the base and a sample of the texts; then print its plan.

    Nothing is loaded: of the base, ``config.json`` is enough, and a tokenizer beside it to count tokens. Settings are
    those of the package's configuration of the base's family; memory decides on micro-batch, activation checkpointing,
    rank and what else has to give way.

    Args:
        base: Hugging Face folder, 4-bit folder of `mixcn quantize`, or hub id.
        text: Texts to pre-train on, as ``NAME=PATH``, such as ``zh=data/zh/*.jsonl.gz en=data/en``. A path is a file, a
            folder or a glob, in quotes where a shell would expand it.
        instruct: Conversations to tune on in place of texts, as ``NAME=PATH`` or a path alone.
        gpu: GPU to train on: its memory, such as ``24gb``, a card's name, such as ``h100-80gb``, or ``cpu``; of several
            in one machine their number before it, such as ``4x24gb``; null is what this machine has.
        out: File to write, which must not exist.

    Raises:
        ValueError: an argument cannot be used, the file exists, no record can be read, or no choice of settings fits.
    """
    from .first_config import write_first_config

    write_first_config(base, text or [], instruct or [], gpu, out)

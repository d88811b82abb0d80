"""The subcommand ``quantization``: what does each way of storing a model's weights cost, in bytes and in likelihood?"""

from collections.abc import Sequence
from pathlib import Path

from lightning_mixcn.studies.texts import StudyText


def quantization(
    src: str,
    *,
    out: str,
    text: StudyText,
    gguf: Sequence[str] = (),
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Compare formats of a model's weights: bytes, bits per weight, bits per byte. It resumes after a kill.

    Formats: the checkpoint's own type; nf4-double, in which this package trains (8-bit block maxima); nf4-single
    (float32 block maxima, computed with but stored nowhere); and GGUF files. Documents and tokens are the same for all.

    The cost is, for each format, one forward pass over all tokens and two or three readings of the checkpoint.
    Mixtral-8x7B (26 GFLOP a token) over 2 sources of 32,768 tokens, 3 formats: 5e15 FLOP, by arithmetic 26 seconds at
    200 TFLOP/s, beside reading 93 GB seven times. One model is in memory at a time; the largest is the unquantised one
    (93 GB).

    Args:
        src: Unquantised Hugging Face folder or hub id, run folder, or PEFT adapter folder. An adapter is merged onto
            its unquantised base first, as `mixcn export` does, into the hidden folder, which then takes a model's bytes
            more; every format is of the merged weights.
        out: Folder to make: quantization.json, .csv, .md and .png. Until it is whole, its parts are in the hidden
            folder .OUT.unfinished beside it.
        text: Texts of the study.
        gguf: GGUF files of the same model (`mixcn export --format gguf`), scored by llama.cpp through the packages gguf
            and llama-cpp-python.
        dtype: Compute type of all formats but GGUF, and that of the unquantised one: ``bfloat16``, ``float16`` or
            ``float32``; null takes the checkpoint's own.
        device: ``cpu``, ``cuda``, ``cuda:1`` …; null is the GPU if there is one.

    Raises:
        ValueError: an option out of its range, a quantised model, or text that cannot be used.
        FileNotFoundError: no such model, text or file.
        FileExistsError: the folder holds something else, or a study with other arguments.
        FloatingPointError: a likelihood is not finite.
    """
    from .study import study_formats

    study_formats(src, Path(out).expanduser().resolve(), text, gguf, dtype, device)

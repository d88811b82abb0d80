"""The subcommand ``data``: what is in a corpus that should not be trained on, and the corpus without it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_mixcn.arguments import Name

from .options import HygieneOptions


def report(sources: list[str], *, out: Name, against: Sequence[str] = (), options: HygieneOptions) -> None:
    """Report duplicates, scripts, noise and benchmark questions in texts. It resumes after a kill.

    Texts are read once, part by part. The threshold options say what `mixcn data clean` would remove.

    Args:
        sources: Files, folders or globs of JSONL, text, parquet or Arrow, which are one source, or the YAML of a run,
            whose `data.init_args.sources` are taken.
        out: Folder to make: report.html (a page that needs nothing else), report.json, removed.jsonl (file, line,
            reason and what it is a copy of) and overlaps.jsonl (every question that a document shares 13 words with).
            Until it is whole, its parts are in the hidden folder .OUT.unfinished beside it.
        against: Benchmarks to look for: names of lm-evaluation-harness tasks or groups, which need the extra `eval`,
            and files of questions: JSONL, parquet or CSV.
        options: Thresholds.

    Raises:
        ValueError: an option out of its range, a source or file that cannot be used, or a package that is missing.
        FileNotFoundError: a path matches no file.
        FileExistsError: the folder holds something else, or a report with other arguments.
    """
    from .study import study_texts

    study_texts(sources, Path(out).expanduser().resolve(), against, options, keep=False)


def clean(
    sources: list[str],
    *,
    out: Name,
    against: Sequence[str] = (),
    compression: Literal["none", "gz", "zst"] | None = None,
    options: HygieneOptions,
) -> None:
    """Write texts without duplicates, benchmark questions and noise. It resumes after a kill.

    Of copies, the first in the order of the sources and their files stays. A document goes for the first reason of:
    letters, digits, markup, replaced, scripts, question, exact, near.

    Args:
        sources: As in `mixcn data report`.
        out: Folder to make: what the report has, and kept/SOURCE.jsonl with the text of each document that stays.
        against: As in `mixcn data report`.
        compression: Compression of the kept documents: ``none``, ``gz`` or ``zst``; null takes that of the source's
            files where all have the same.
        options: Thresholds.

    Raises:
        ValueError: an option out of its range, a source or file that cannot be used, or a package that is missing.
        FileNotFoundError: a path matches no file.
        FileExistsError: the folder holds something else, or texts cleaned with other arguments.
    """
    from .study import study_texts

    study_texts(sources, Path(out).expanduser().resolve(), against, options, keep=True, compression=compression)

"""Text for the vocabulary's studies, read as it comes: nothing is copied to the cache folder or to a temporary file."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from lightning_mixcn.text import Source, parse_sources
from lightning_mixcn.text.documents import iterate_documents
from lightning_mixcn.text.listings import LeftOut
from lightning_mixcn.text.sources import DocumentUnit, SourceFile, list_files

# SentencePiece leaves out sentences of more than 4,192 bytes without a word; a character has 4 at most.
MAX_SENTENCE_CHARACTERS = 1_000
_logger = logging.getLogger(__name__)
_END = re.compile(r"[。！？；.!?;]+|\s+")


def named_files(text: Sequence[str], text_key: str, document_unit: DocumentUnit) -> dict[str, list[SourceFile]]:
    """The files of each ``name=PATH``.

    Args:
        text: The arguments.
        text_key: JSONL key, or parquet or Arrow column, of the text.
        document_unit: What a document is in a text file.

    Raises:
        ValueError: an argument of another form, a name twice, or a format that is not known.
        FileNotFoundError: a path matches no file.
    """
    entries = []
    for entry in text:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise ValueError(f"`text` has {entry!r}: expected name=PATH, e.g. zh=data/zh.jsonl")
        entries.append(Source(name, path, text_key=text_key))
    sources = parse_sources(entries, "text", Source)
    return {source.name: _files(source, f"text[{place}]", document_unit) for place, source in enumerate(sources)}


def corpus_files(paths: Sequence[str], text_key: str) -> list[SourceFile]:
    """The files of a corpus; of a text file every line is a document, so that a large one is never held whole."""
    (source,) = parse_sources([Source("corpus", list(paths), text_key=text_key)], "corpus", Source)
    return _files(source, "corpus", "line")


def _files(source: Source, place: str, document_unit: DocumentUnit) -> list[SourceFile]:
    left_out = LeftOut()
    files = list_files(source, place, left_out)
    left_out.tell(_logger, source.name, len(files))
    return [
        SourceFile(file.path, file.format, file.text_key, document_unit if file.format == "text" else "file")
        for file in files
    ]


def iterate_texts(files: Sequence[SourceFile], says: str) -> Iterator[str]:
    """The texts of files, one after the other, with a progress bar over bytes read.

    Raises:
        ValueError: a record is broken; names file and line.
    """
    sizes = [file.path.stat().st_size for file in files if isinstance(file.path, Path)]
    total = sum(sizes) if len(sizes) == len(files) else None
    with tqdm(total=total, unit="B", unit_scale=True, desc=says, delay=2, leave=False) as progress:
        for file in files:
            for _, encoded in iterate_documents(file, on_read=progress.update):
                yield encoded.decode()


def sentences(texts: Iterator[str]) -> Iterator[str]:
    """Lines of texts, long ones cut at the end of a sentence or between words."""
    for text in texts:
        for line in text.splitlines():
            start = 0
            while start < len(line):
                stop = _cut(line, start)
                if part := line[start:stop].strip():
                    yield part
                start = stop


def _cut(line: str, start: int) -> int:
    """Where a sentence that begins at ``start`` ends: the rest if it is short, else behind the last end in reach."""
    limit = start + MAX_SENTENCE_CHARACTERS
    if limit >= len(line):
        return len(line)
    ends = [match.end() for match in _END.finditer(line, start, limit)]
    return ends[-1] if ends else limit

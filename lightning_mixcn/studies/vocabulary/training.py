"""SentencePiece models as data: training one, and reading the pieces of one."""

import io
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from lightning_mixcn.errors import UserError
from lightning_mixcn.text import Source, parse_sources
from lightning_mixcn.text.corpus.formats import iterate_documents
from lightning_mixcn.text.corpus.listings import LeftOut, list_files
from lightning_mixcn.text.corpus.sources import DocumentUnit, SourceFile

ModelType = Literal["bpe", "unigram"]


def train_pieces(
    lines: Iterator[str],
    *,
    vocab_size: int,
    model_type: ModelType,
    character_coverage: float,
    max_piece_characters: int,
    max_sentences: int,
    seed: int,
) -> bytes:
    """Train SentencePiece on sentences as they come.

    Args:
        lines: The sentences.
        vocab_size: Pieces, the three special ones included.
        model_type: ``bpe`` or ``unigram``.
        character_coverage: Share of the characters of the text that get a piece.
        max_piece_characters: Characters of the longest piece.
        max_sentences: Sentences drawn at random from all, more than 100; 0 takes all.
        seed: Seed of that draw.

    Returns:
        The serialised model. Text is not normalised, as in Mixtral's own.

    Raises:
        ValueError: SentencePiece cannot make such a model of this text, or there is none.
    """
    import sentencepiece

    sentencepiece.set_random_generator_seed(seed)
    model, counted = io.BytesIO(), _Counted(lines)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=counted,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            max_sentencepiece_length=max_piece_characters,
            input_sentence_size=max_sentences,
            shuffle_input_sentence=bool(max_sentences),
            normalization_rule_name="identity",
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if counted.error is not None:
            raise counted.error from None
        if not counted.count:
            raise UserError("`corpus` holds no text: every document is empty. Give files with text") from error
        says = re.sub(r"^.*\] *", "", str(error)).rstrip(". ") or str(error)  # after its own file and condition
        raise UserError(
            f"SentencePiece cannot make {vocab_size} pieces of {counted.count:,} sentences: {says}. Choose another "
            "`vocab_size`, or give more text"
        ) from error
    return model.getvalue()


class _Counted:
    """Counts what an iterator gives, and keeps its error, which SentencePiece would replace with one of its own."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self.count = lines, 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise StopIteration from None
        self.count += 1
        return line


# SentencePiece leaves out sentences of more than 4,192 bytes without a word; a character has 4 at most.
MAX_SENTENCE_CHARACTERS = 1_000
_logger = logging.getLogger(__name__)
_END = re.compile(r"[。！？；.!?;]+|\s+")


def named_files(text: Sequence[str], text_key: str, document_unit: DocumentUnit) -> dict[str, list[SourceFile]]:
    """List the files of each ``name=PATH``.

    Args:
        text: The arguments.
        text_key: JSONL key, or parquet or Arrow column, of the text.
        document_unit: Extent of a document in a text file.

    Raises:
        ValueError: an argument of another form, a name twice, or a format that is not known.
        FileNotFoundError: a path matches no file.
    """
    entries = []
    for entry in text:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise UserError(f"`text` has {entry!r}: expected name=PATH, e.g. zh=data/zh.jsonl")
        entries.append(Source(name, path, text_key=text_key))
    sources = parse_sources(entries, "text", Source)
    return {source.name: _files(source, f"text[{place}]", document_unit) for place, source in enumerate(sources)}


def corpus_files(paths: Sequence[str], text_key: str) -> list[SourceFile]:
    """List a corpus's files; of a text file every line is a document, so that a large one is never held whole."""
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
    """Yield the texts of files, one after the other, with a progress bar over bytes read.

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
    """Yield lines of texts, long ones cut at the end of a sentence or between words."""
    for text in texts:
        for line in text.splitlines():
            start = 0
            while start < len(line):
                stop = _cut(line, start)
                if part := line[start:stop].strip():
                    yield part
                start = stop


def _cut(line: str, start: int) -> int:
    """Return the end of a sentence that begins at ``start``: the rest if it is short, else the last end in reach."""
    limit = start + MAX_SENTENCE_CHARACTERS
    if limit >= len(line):
        return len(line)
    ends = [match.end() for match in _END.finditer(line, start, limit)]
    return ends[-1] if ends else limit

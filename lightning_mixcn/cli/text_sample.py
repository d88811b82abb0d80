"""A look at the beginning of some files of a source: what is in them, and what a reader would refuse."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_mixcn.errors import UserError
from lightning_mixcn.studies.hygiene.characters import SCRIPT_NAMES, count_scripts, take_apart
from lightning_mixcn.text import ConversationSource, Source, TextTokenizer, load_conversation
from lightning_mixcn.text.corpus.formats import iterate_documents, iterate_records
from lightning_mixcn.text.corpus.listings import list_files
from lightning_mixcn.text.corpus.reading import ignore_progress
from lightning_mixcn.text.corpus.sources import DEFAULT_KEY, DocumentUnit, SourceFile
from lightning_mixcn.text.corpus.store import RecordTally

_FILES, _DOCUMENTS, _BYTES = 8, 400, 2**21
_TOKENIZED_BYTES = 2**18
# Where the base has no tokenizer: of English about 4, of Chinese in a tokenizer made for English 2.
_BYTES_A_TOKEN = 3.0
_PROMPT_CHARACTERS = 12
# Of 20, a quarter held out by hash is not one document in 3 of 1,000 cases.
FEW_DOCUMENTS = 20
_SHOWN_SHARE = 0.02


@dataclass(frozen=True)
class Sample:
    """What a sample of a source shows.

    Args:
        source: The source, its ``text_key`` set to the key that has the text.
        files: Number of its files.
        formats: Their formats.
        documents: Documents that were read.
        bad_records: Records that were refused.
        bad_place: Error of the first of these; empty if there is none.
        tokens_a_document: Mean number of tokens.
        is_counted: True if a tokenizer counted them, false if they are guessed from bytes.
        scripts: Share of the letters in each script, the largest first.
        all_documents: Estimate of the documents of all files; null where their sizes are not known.
        prompt: Beginning of a text.
    """

    source: Source | ConversationSource
    files: int
    formats: tuple[str, ...]
    documents: int
    bad_records: int
    bad_place: str
    tokens_a_document: float
    is_counted: bool
    scripts: tuple[tuple[str, float], ...]
    all_documents: int | None
    prompt: str

    @property
    def all_tokens(self) -> int | None:
        """Estimate of the tokens of all files."""
        return None if self.all_documents is None else round(self.all_documents * self.tokens_a_document)

    @property
    def is_small(self) -> bool:
        """True if there are too few documents to hold some of them out."""
        return self.all_documents is not None and self.all_documents < FEW_DOCUMENTS

    def text(self) -> str:
        """Return what was found, on one line."""
        is_text = isinstance(self.source, Source)
        kind = "document" if is_text else "conversation"
        scripts = ", ".join(f"{name} {share:.0%}" for name, share in self.scripts if share >= _SHOWN_SHARE)
        about = "about" if self.is_counted else f"without a tokenizer, at {_BYTES_A_TOKEN:g} bytes each, perhaps"
        in_all = "" if self.all_tokens is None else f", {_rounded(self.all_tokens)} tokens in all"
        key = f", text in {self.source.text_key!r}" if is_text and self.source.text_key != DEFAULT_KEY else ""
        return (
            f"{self.files:,} file{'s' * (self.files > 1)} ({', '.join(self.formats)}{key}); a sample of "
            f"{self.documents:,} {kind}{'s' * (self.documents > 1)}: {about} {self.tokens_a_document:,.0f} "
            f"tokens in each{in_all}; letters: {scripts or 'none'}"
        )


def look_at_source(source: Source | ConversationSource, place: str, tokenizer: TextTokenizer | None) -> Sample:
    """Read the beginning of up to eight of a source's files; of a few text files, blocks or lines become documents.

    Args:
        source: The source.
        place: Name of it, for errors.
        tokenizer: Tokenizer of the base, or null to guess.

    Raises:
        FileNotFoundError: no file is there.
        ValueError: not one document can be read; says why the first one cannot.
    """
    sample = _sample(source, place, tokenizer)
    if not isinstance(source, Source) or sample.formats != ("text",) or not sample.is_small:
        return sample
    units: tuple[DocumentUnit, ...] = ("blank-line", "line")
    divided = (_sample(replace(source, document_unit=unit), place, tokenizer) for unit in units)
    return next((each for each in divided if not each.is_small), sample)


def _sample(source: Source | ConversationSource, place: str, tokenizer: TextTokenizer | None) -> Sample:
    files, tally = list_files(source, place), RecordTally()
    chosen = [files[index] for index in np.linspace(0, len(files) - 1, min(_FILES, len(files)), dtype=int)]
    beginnings = []
    for file in chosen:
        if isinstance(source, Source) and (key := _text_key(file)) != source.text_key:
            source = replace(source, text_key=key)
        beginnings.append(_read_beginning(replace(file, text_key=source.text_key), tally, len(chosen)))
    texts = [_text_of(document, source) for beginning in beginnings for document in beginning.documents]
    if not texts:
        told = tally.bad_places[0] if tally.bad_places else f"`{chosen[0].path}` has nothing but white space"
        raise UserError(f"`{place}`: of the sample not one document can be read. The first one: {told}")
    return Sample(
        source,
        len(files),
        tuple(sorted({file.format for file in files})),
        len(texts),
        tally.bad_records,
        tally.bad_places[0] if tally.bad_places else "",
        _tokens_a_document(texts, tokenizer),
        tokenizer is not None,
        _scripts(texts),
        _all_documents(files, beginnings),
        _prompt(texts),
    )


class _Beginning(NamedTuple):
    """The first documents of a file, and the number of documents in its first bytes as they are stored."""

    documents: list[str]
    number: int
    num_bytes: int


def _read_beginning(file: SourceFile, tally: RecordTally, shares: int) -> _Beginning:
    documents, count, size, read, end = list[str](), 0, 0, 0, -1

    def on_read(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes

    for _, encoded in iterate_documents(file, tally.add, on_read, tally):
        if end < 0:
            documents.append(encoded.decode())
            size += len(encoded)
            if len(documents) * shares >= _DOCUMENTS or size * shares >= _BYTES:
                end = read
        elif read > end:
            break
        # Files are read by pieces: what is left of this one is counted, so that count and bytes are of the same.
        count += 1
    else:
        end = read
    return _Beginning(documents, count, end)


def _text_key(file: SourceFile) -> str:
    """Return the file's key of the text; where the first record lacks it, the key of its longest text."""
    if file.format == "text":
        return file.text_key
    first = next(iterate_records(replace(file, records="any"), lambda _: None, ignore_progress, RecordTally()), None)
    record = None if first is None else first[1]
    if not isinstance(record, dict) or file.text_key in record:
        return file.text_key
    lengths = {key: len(value) for key, value in record.items() if isinstance(value, str)}
    return max(lengths, key=lambda key: lengths[key], default=file.text_key)


def _text_of(document: str, source: Source | ConversationSource) -> str:
    if isinstance(source, Source):
        return document
    return "\n".join(turn.content for turn in load_conversation(document))


def _tokens_a_document(texts: Sequence[str], tokenizer: TextTokenizer | None) -> float:
    if tokenizer is None:
        return sum(len(text.encode()) for text in texts) / _BYTES_A_TOKEN / len(texts)
    ends = np.cumsum([len(text.encode()) for text in texts])
    counted = texts[: max(1, int(np.searchsorted(ends, _TOKENIZED_BYTES)))]
    tokens = sum(map(len, tokenizer.encode_batch(counted)))
    # Of what is counted the share of bytes is known, of documents perhaps not: one of them may be a book.
    return tokens / int(ends[len(counted) - 1]) * int(ends[-1]) / len(texts)


def _scripts(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    letters = np.sum([count_scripts(take_apart(text))[0] for text in texts], axis=0)
    order = np.argsort(-letters, kind="stable")
    return tuple((SCRIPT_NAMES[index], float(letters[index] / letters.sum())) for index in order if letters[index])


def _all_documents(files: Sequence[SourceFile], beginnings: Sequence[_Beginning]) -> int | None:
    number, num_bytes = sum(each.number for each in beginnings), sum(each.num_bytes for each in beginnings)
    paths = [file.path for file in files]
    if not num_bytes or not all(isinstance(path, Path) and path.is_file() for path in paths):
        return None
    return max(number, round(number * sum(map(os.path.getsize, paths)) / num_bytes))


def _prompt(texts: Sequence[str]) -> str:
    """Return the first words of a text, or so many characters where words are not apart."""
    prompt = ""
    for word in texts[0].split():
        if prompt and len(prompt) + len(word) > 2 * _PROMPT_CHARACTERS:
            break
        prompt = f"{prompt} {word}".strip()
        if len(prompt) >= _PROMPT_CHARACTERS:
            break
    return prompt if len(prompt) <= 2 * _PROMPT_CHARACTERS else prompt[:_PROMPT_CHARACTERS]


def _rounded(count: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)

"""One pass over all documents: figures of each, its hash, its signature and its overlaps, part by part on the disk."""

import bisect
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lightning_mixcn.studies.parts import Arrays, StudyParts
from lightning_mixcn.text import Corpus, DocumentOrigin

from .characters import (
    SCRIPT_NAMES,
    Hashes,
    Text,
    count_scripts,
    line_hashes,
    shingles,
    take_apart,
    token_hashes,
)
from .contamination import QuestionIndex
from .signatures import BANDS, ROWS, SignatureFile, signatures

# What one part holds: little enough that its shingles stay small in memory.
_PART_BYTES, _PART_DOCUMENTS = 4 << 20, 8192
# Fewer shingles say little of a document; equal ones are found by their hash.
_FEWEST_SHINGLES = 16
_MARKUP = re.compile(r"</?[A-Za-z!][^<>\n]{0,500}>|&(?:#\d{1,7}|#x[0-9a-fA-F]{1,6}|[A-Za-z]{2,8});|\[\[|\]\]|\{\{|\}\}")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Texts:
    """Documents of several corpora, counted through.

    Args:
        corpora: The corpora, in the order in which their documents are counted.
    """

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.corpora = corpora
        self.starts = list(accumulate(map(len, corpora), initial=0))

    def __len__(self) -> int:
        """Count the documents."""
        return self.starts[-1]

    def text(self, number: int) -> str:
        """Return a document's text."""
        corpus, index = self._locate(number)
        return corpus.text(index)

    def origin(self, number: int) -> DocumentOrigin:
        """Tell where a document was read."""
        corpus, index = self._locate(number)
        return corpus.origin(index)

    def _locate(self, number: int) -> tuple[Corpus, int]:
        place = bisect.bisect_right(self.starts, number) - 1
        return self.corpora[place], number - self.starts[place]

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """Cut the documents of each corpus into parts: the corpus's number, the first document, the one behind."""
        for number, corpus in enumerate(self.corpora):
            begin, size = 0, 0
            for index in range(len(corpus)):
                size += corpus.num_bytes_of(index)
                if size >= _PART_BYTES or index + 1 - begin == _PART_DOCUMENTS or index + 1 == len(corpus):
                    yield number, self.starts[number] + begin, self.starts[number] + index + 1
                    begin, size = index + 1, 0


class Scan(NamedTuple):
    """What the pass found: some 120 bytes of memory a document.

    Args:
        hashes: Hash of each document's letters and digits ``[D]``, of 16 bytes as two numbers ``[D, 2]``.
        counts: Characters, letters, digits, markup, replacement characters and lines of each ``[D, 6]``.
        letters: Letters of each script ``[D, len(SCRIPT_NAMES)]``.
        lines: Lines by script, of each corpus ``[corpora, len(SCRIPT_NAMES)]``.
        shingles: Number of distinct shingles, 0 where a document has no signature ``[D]``.
        is_dense: True where most letters are Han, kana or Hangul ``[D]``.
        overlaps: Document, question and share of each overlap ``[N, 3]``.
        signatures: Signatures of those with shingles; None without.
    """

    hashes: NDArray[np.uint64]
    counts: NDArray[np.uint32]
    letters: NDArray[np.uint32]
    lines: NDArray[np.int64]
    shingles: NDArray[np.uint32]
    is_dense: NDArray[np.bool_]
    overlaps: NDArray[np.float64]
    signatures: SignatureFile | None


COUNTED = ("characters", "letters", "digits", "markup", "replaced", "lines")


def scan(texts: Texts, index: QuestionIndex, parts: StudyParts, *, with_signatures: bool) -> Scan:
    """Read every document once, but for the parts that were finished before.

    Args:
        texts: The documents.
        index: The questions to look for.
        parts: Finished parts.
        with_signatures: True if near duplicates are looked for.
    """
    file = None
    if with_signatures:
        parts.folder.mkdir(parents=True, exist_ok=True)
        file = SignatureFile(parts.folder / "signatures.bin", len(texts))
    total = sum(corpus.total_bytes for corpus in texts.corpora)
    done, lines = list[Arrays](), np.zeros((len(texts.corpora), len(SCRIPT_NAMES)), np.int64)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", delay=1) as progress:
        for number, (corpus, begin, end) in enumerate(texts.parts()):
            name = f"part-{number:06d}"
            if name not in parts:
                parts.save(name, _scan_part(texts, range(begin, end), index, file))
            part = parts.load(name)
            lines[corpus] += part.pop("lines")
            progress.update(int(part.pop("bytes")))
            done.append(part)
    joined = {name: np.concatenate([part[name] for part in done]) for name in done[0]}
    return Scan(**joined, lines=lines, signatures=file)


def _scan_part(texts: Texts, numbers: range, index: QuestionIndex, file: SignatureFile | None) -> Arrays:
    rows: list[tuple[Any, ...]] = []
    letters, overlaps, sets = list[Any](), list[tuple[float, ...]](), list[Hashes]()
    lines, size = np.zeros(len(SCRIPT_NAMES), np.int64), 0
    for number in numbers:
        content = texts.text(number)
        size += len(content.encode())
        text = take_apart(content)
        by_script, by_line, digits = count_scripts(text)
        lines += by_line
        letters.append(by_script)
        markup = sum(len(found) for found in _MARKUP.findall(content))
        replaced = content.count(_REPLACEMENT)
        rows.append((len(content), len(text.letters), digits, markup, replaced, len(text.newlines) + 1))
        overlaps += [(number, *overlap) for overlap in index.overlaps(token_hashes(text), line_hashes(text))]
        sets.append(distinct_shingles(text) if file else np.zeros(0, np.uint64))
        rows[-1] += (*np.frombuffer(xxhash.xxh3_128_digest(text.letters.tobytes()), np.uint64), text.is_dense)
    if file is not None:
        _write_signatures(file, numbers.start, sets)
    columns = list(zip(*rows, strict=True))
    return {
        "hashes": np.array(columns[6:8], np.uint64).T,
        "counts": np.array(columns[:6], np.uint32).T,
        "letters": np.array(letters, np.uint32),
        "lines": lines,
        "shingles": np.array([len(each) for each in sets], np.uint32),
        "is_dense": np.array(columns[8], bool),
        "overlaps": np.array(overlaps, np.float64).reshape(-1, 3),
        "bytes": np.array(size),
    }


def distinct_shingles(text: Text) -> Hashes:
    """Return the distinct shingles of a text, ascending; none of a text that has too few."""
    found = np.unique(shingles(text, text.is_dense))
    return found if len(found) >= _FEWEST_SHINGLES else found[:0]


def _write_signatures(file: SignatureFile, start: int, sets: list[Hashes]) -> None:
    values = np.zeros((BANDS, len(sets), ROWS), np.uint16)
    if places := [place for place, found in enumerate(sets) if len(found)]:
        values[:, places] = signatures([sets[place] for place in places])
    file.write(start, values)


def distinct_shingles_of(texts: Texts, number: int) -> Hashes:
    """Return the distinct shingles of a document."""
    return distinct_shingles(take_apart(texts.text(number)))

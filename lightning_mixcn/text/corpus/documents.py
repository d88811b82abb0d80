"""The training, validation, test and prediction documents of a run, and the order of an epoch."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, get_args

import numpy as np

from lightning_mixcn.errors import UserError

from .sources import AnySource, SourceKind, parse_sources
from .store import BadRecordPolicy, Corpus, DocumentOrigin
from .unpack import read_corpus

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STAGES = ("train", "val", "test", "predict")
_DIGESTS = 2.0**64
_ROUNDS = 8
_MASK = 2**64 - 1


class StageDocuments:
    """Documents of each stage, one set a source.

    Validation and test documents are held out of the training sources by a hash of their text, unless sources of
    their own are given.

    Args:
        kind: Class of the sources.
        sources: Training sources.
        held_out: Sources of the stages `val` and `test`, and the share held out of `sources` where they are empty.
        predict_sources: Sources of the stage `predict`.
        on_bad_record: `error` or `skip`.

    Raises:
        ValueError: A source has a bad field, two have one name, or the shares leave nothing for training.
    """

    def __init__(
        self,
        kind: type[SourceKind],
        sources: Sequence[SourceKind],
        held_out: dict[str, tuple[Sequence[SourceKind], float]],
        predict_sources: Sequence[SourceKind],
        on_bad_record: BadRecordPolicy = "error",
    ) -> None:
        """Check the arguments; nothing is read yet."""
        if on_bad_record not in get_args(BadRecordPolicy):
            raise UserError(f"`on_bad_record={on_bad_record!r}`: expected error or skip")
        given = {"sources": sources, "predict_sources": predict_sources}
        given |= {f"{stage}_sources": stage_sources for stage, (stage_sources, _) in held_out.items()}
        self._sources: dict[str, tuple[AnySource, ...]] = {
            argument: parse_sources(entries, argument, kind) for argument, entries in given.items()
        }
        shares = {f"{stage}_fraction": share for stage, (_, share) in held_out.items()}
        if not (min(shares.values()) >= 0 and sum(shares.values()) < 1):
            got = " and ".join(f"`{name}={share}`" for name, share in shares.items())
            raise UserError(f"{got}: expected shares of at least 0 that leave something for training, e.g. 0.005")
        self._fractions = {stage: 0.0 if own else share for stage, (own, share) in held_out.items()}
        self.on_bad_record: BadRecordPolicy = on_bad_record
        self._sets: dict[str, list[DocumentSet]] = {}
        self.training: list[TrainingDocuments] = []

    def names(self, stage: str) -> list[str]:
        """List the sources of a stage, in the order in which `source_ids` counts them.

        Raises:
            ValueError: There is no such stage.
        """
        if stage not in _STAGES:
            raise UserError(f"`stage={stage!r}`: expected one of {', '.join(_STAGES)}")
        return [source.name for source in self._sources.get(f"{stage}_sources") or self._sources["sources"]]

    @property
    def by_progress(self) -> bool:
        """True if the weight of a training source changes in the run."""
        return any(isinstance(source.weight, Mapping) for source in self._sources["sources"])

    def describe(self) -> dict[str, int]:
        """Count documents and UTF-8 bytes of each set read, as ``<stage>/<source>/documents`` and ``bytes``."""
        counts: dict[str, int] = {}
        sets: dict[str, Sequence[DocumentSet | TrainingDocuments]] = {"train": self.training, **self._sets}
        for stage, parts in sets.items():
            for part in parts:
                counts[f"{stage}/{part.name}/documents"] = len(part)
                counts[f"{stage}/{part.name}/bytes"] = part.num_bytes
        return counts

    def prepare(self, stage: str) -> None:
        """Read the documents that a stage of the trainer needs: `fit`, `validate`, `test` or `predict`."""
        if stage == "fit":
            self.read_training()
            self.read("val", required=False)
        else:
            self.read("val" if stage == "validate" else stage)

    def read_training(self) -> list[TrainingDocuments]:
        """Get the training documents, unpacking files at the first time.

        Returns:
            One set a source, each with at least one document.

        Raises:
            FileNotFoundError: A path matches no file.
            ValueError: A file is damaged, or a source has no document for training.
        """
        if not self.training:
            self._split("train")
        for documents in self.training:
            if not len(documents):
                raise UserError(
                    f"No document of source {documents.name!r} ({len(documents.corpus)} in all) is left for training. "
                    "Lower `val_fraction` and `test_fraction`, or give `val_sources` and `test_sources`"
                )
        return self.training

    def read(self, stage: str, *, required: bool = True) -> list[DocumentSet]:
        """Get the documents of a stage to evaluate, unpacking files at the first time.

        Args:
            stage: `val`, `test` or `predict`.
            required: True if it is an error to have no such set (no sources and a share of 0).

        Returns:
            One set a source, each with at least one document; empty if there is no set and none is required.

        Raises:
            FileNotFoundError: A path matches no file.
            ValueError: A file is damaged, or a source has no document for the stage.
        """
        if stage not in self._sets:
            if self._sources.get(f"{stage}_sources"):
                self._sets[stage] = [all_documents(corpus) for corpus in self._corpora(f"{stage}_sources")]
            elif stage == "predict":
                raise UserError("`predict_sources` is empty. Give the sources whose documents are to be scored")
            elif self._fractions[stage] > 0:
                self._split(stage)
            elif required:
                raise UserError(
                    f"There is no {stage} set: `{stage}_sources` is empty and `{stage}_fraction` is 0. Give one of them"
                )
            else:
                return []
        for documents in self._sets[stage]:
            self._require_documents(stage, documents)
        return self._sets[stage]

    def _corpora(self, argument: str) -> list[Corpus]:
        return [
            read_corpus(source, f"{argument}[{index}]", on_bad_record=self.on_bad_record)
            for index, source in enumerate(self._sources[argument])
        ]

    def _split(self, wanted: str) -> None:
        """Read `sources` and hold documents out of them."""
        if not self._sources["sources"]:
            instead = "" if wanted == "train" else f", or `{wanted}_sources`"
            raise UserError(f"`sources` is empty. Give at least one, e.g. {{name: zh, path: data/zh}}{instead}")
        stages = [stage for stage, share in self._fractions.items() if share > 0]
        shares = [self._fractions[stage] for stage in stages]
        splits = [split_by_hash(corpus, shares) for corpus in self._corpora("sources")]
        self.training = [training for _, training in splits]
        self._sets |= {stage: [held_out[index] for held_out, _ in splits] for index, stage in enumerate(stages)}

    def _require_documents(self, stage: str, documents: DocumentSet) -> None:
        if not len(documents):
            raise UserError(
                f"`{stage}_fraction={self._fractions[stage]}` holds out no document of source {documents.name!r} "
                f"({len(documents.corpus)} in all). Raise it, give `{stage}_sources`, or set it to 0 for no {stage} set"
            )


@dataclass(frozen=True)
class DocumentSet:
    """Some documents of a corpus, in a fixed order, for evaluation.

    Args:
        corpus: Corpus of the source.
        indices: Positions in the corpus.
    """

    corpus: Corpus
    indices: Sequence[int]

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.corpus.source.name

    def __len__(self) -> int:
        """Count the documents."""
        return len(self.indices)

    def text(self, index: int) -> str:
        """Get the text of document `index` of this set."""
        return self.corpus.text(self.indices[index])

    def origin(self, index: int) -> DocumentOrigin:
        """Tell where document `index` of this set was read."""
        return self.corpus.origin(self.indices[index])

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the set's texts."""
        if len(self) == len(self.corpus):
            return self.corpus.total_bytes
        return sum(self.corpus.num_bytes_of(index) for index in self.indices)


@dataclass(frozen=True)
class TrainingDocuments:
    """Documents of a corpus that are not held out; known by their hash, so that no list of them is kept.

    Args:
        corpus: Corpus of the source.
        held_out: Documents of the corpus that are not for training.
        share: Share of the range of hashes below which documents are held out.
    """

    corpus: Corpus
    held_out: DocumentSet = field(repr=False)
    share: float

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.corpus.source.name

    def __len__(self) -> int:
        """Count the documents."""
        return len(self.corpus) - len(self.held_out)

    def __contains__(self, index: int) -> bool:
        """Tell whether document `index` of the corpus is for training."""
        return not self.share or self.corpus.digest(index) / _DIGESTS >= self.share

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the set's texts."""
        return self.corpus.total_bytes - self.held_out.num_bytes

    def index_of(self, number: int, seed: int) -> int:
        """Return the index of a document in the corpus, held out or not.

        Args:
            number: Number of the document in the run, counted through all epochs.
            seed: Seed of the order of documents, which is another in each epoch.
        """
        epoch, place = divmod(number, len(self.corpus))
        return _permutation(len(self.corpus), f"{seed}/{self.name}/{epoch}")[place]

    @property
    def fingerprint(self) -> str:
        """Hex digest of the texts in their order, and of what is held out."""
        return hashlib.blake2b(f"{self.corpus.fingerprint}/{self.share}".encode(), digest_size=16).hexdigest()


def split_by_hash(corpus: Corpus, fractions: Sequence[float]) -> tuple[list[DocumentSet], TrainingDocuments]:
    """Divide documents into held-out sets and the rest by a hash of their text.

    The division depends on the texts alone: not on seeds, files or their order. Equal texts, even of different
    sources, come to the same side as long as the fractions are the same.

    Args:
        corpus: Corpus to divide.
        fractions: Expected share of each held-out set; they sum to less than 1.

    Returns:
        One set a fraction, ordered by hash, and the rest.
    """
    edges = np.cumsum([0.0, *fractions])
    indices, shares = _below(corpus, float(edges[-1]))
    held_out = [
        DocumentSet(corpus, indices[(shares >= low) & (shares < high)].tolist())
        for low, high in itertools.pairwise(edges)
    ]
    return held_out, TrainingDocuments(corpus, DocumentSet(corpus, indices.tolist()), float(edges[-1]))


def _below(corpus: Corpus, share: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find the documents with a hash below `share` of its range, ordered by hash, and their shares of it."""
    found = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64))]
    if share > 0:
        for first, digests in corpus.digest_blocks():
            inside = np.flatnonzero(digests / _DIGESTS < share)
            found.append((inside + first, digests[inside]))
    indices, hashes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(hashes, kind="stable")
    return indices[order], hashes[order] / _DIGESTS


def all_documents(corpus: Corpus) -> DocumentSet:
    """Take every document, in the order of the corpus."""
    return DocumentSet(corpus, range(len(corpus)))


class Permutation:
    """A permutation of ``0 … size - 1`` that is computed place by place.

    An alternating Feistel network over the next power of two, at least 16, walked until it lands inside (Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): fewer than two steps on average for more than 16 places.
    Shuffling a hundred million documents thus takes no table of a hundred million places, in no process.

    Args:
        size: Number of places, at least 1.
        key: Seed of the permutation.
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
        """Return the index at `place`, which is at least 0 and less than the size."""
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
    """Mix bits as SplitMix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators")."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=64)
def _permutation(size: int, key: str) -> Permutation:
    return Permutation(size, key)

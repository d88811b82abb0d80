"""The training, validation, test and prediction documents of a run, read when they are first needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from lightning_mixcn.errors import UserError
from lightning_mixcn.text import (
    AnySource,
    BadRecordPolicy,
    Corpus,
    DocumentSet,
    SourceKind,
    TrainingDocuments,
    all_documents,
    parse_sources,
    read_corpus,
    split_by_hash,
)

STAGES = ("train", "val", "test", "predict")


class DocumentSets:
    """The documents of each stage, one set a source.

    Validation and test documents are held out of the training sources by a hash of their text, unless sources of
    their own are given.

    Args:
        kind: `Source` or `ConversationSource`.
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
        if min(shares.values()) < 0 or sum(shares.values()) >= 1:
            got = " and ".join(f"`{name}={share}`" for name, share in shares.items())
            raise UserError(f"{got}: expected shares of at least 0 that leave something for training, e.g. 0.005")
        self._fractions = {stage: 0.0 if own else share for stage, (own, share) in held_out.items()}
        self.on_bad_record: BadRecordPolicy = on_bad_record
        self._sets: dict[str, list[DocumentSet]] = {}
        self._training: list[TrainingDocuments] = []

    def names(self, stage: str) -> list[str]:
        """List the sources of a stage, in the order in which `source_ids` counts them.

        Raises:
            ValueError: There is no such stage.
        """
        if stage not in STAGES:
            raise UserError(f"`stage={stage!r}`: expected one of {', '.join(STAGES)}")
        return [source.name for source in self._sources.get(f"{stage}_sources") or self._sources["sources"]]

    def describe(self) -> dict[str, int]:
        """Count documents and UTF-8 bytes of each set read, as ``<stage>/<source>/documents`` and ``bytes``."""
        counts: dict[str, int] = {}
        sets: dict[str, Sequence[DocumentSet | TrainingDocuments]] = {"train": self._training, **self._sets}
        for stage, parts in sets.items():
            for part in parts:
                counts[f"{stage}/{part.name}/documents"] = len(part)
                counts[f"{stage}/{part.name}/bytes"] = part.num_bytes
        return counts

    def read_training(self) -> list[TrainingDocuments]:
        """Get the training documents, unpacking files at the first time.

        Returns:
            One set a source, each with at least one document.

        Raises:
            FileNotFoundError: A path matches no file.
            ValueError: A file is damaged, or a source has no document for training.
        """
        if not self._training:
            self._split("train")
        for documents in self._training:
            if not len(documents):
                raise UserError(
                    f"No document of source {documents.name!r} ({len(documents.corpus)} in all) is left for training. "
                    "Lower `val_fraction` and `test_fraction`, or give `val_sources` and `test_sources`"
                )
        return self._training

    def read(self, stage: str, *, required: bool = True) -> list[DocumentSet]:
        """Get the documents of a stage to evaluate, unpacking files at the first time.

        Args:
            stage: `val`, `test` or `predict`.
            required: Whether it is an error to have no such set (by no sources and a share of 0).

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

    def _corpora(self, argument: str) -> Iterator[Corpus]:
        for index, source in enumerate(self._sources[argument]):
            yield read_corpus(source, f"{argument}[{index}]", on_bad_record=self.on_bad_record)

    def _split(self, wanted: str) -> None:
        """Read `sources` and hold documents out of them."""
        if not self._sources["sources"]:
            instead = "" if wanted == "train" else f", or `{wanted}_sources`"
            raise UserError(f"`sources` is empty. Give at least one, e.g. {{name: zh, path: data/zh}}{instead}")
        stages = [stage for stage, share in self._fractions.items() if share > 0]
        shares = [self._fractions[stage] for stage in stages]
        splits = [split_by_hash(corpus, shares) for corpus in self._corpora("sources")]
        self._training = [training for _, training in splits]
        self._sets |= {stage: [held_out[index] for held_out, _ in splits] for index, stage in enumerate(stages)}

    def _require_documents(self, stage: str, documents: DocumentSet) -> None:
        if not len(documents):
            raise UserError(
                f"`{stage}_fraction={self._fractions[stage]}` holds out no document of source {documents.name!r} "
                f"({len(documents.corpus)} in all). Raise it, give `{stage}_sources`, or set it to 0 for no {stage} set"
            )

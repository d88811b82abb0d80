"""Plain text for continued pre-training, as a LightningDataModule with exact resume."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mixcn.arguments import Name, RowTokens, Seed, Share, check_arguments
from lightning_mixcn.text import (
    BadRecordPolicy,
    DocumentSet,
    Packing,
    PlainText,
    Source,
    StageDocuments,
    WeightUnit,
)

from .module import BatchRows, EvaluationRows, ProgressRows, StreamDataModule, Streams, Workers


class PretrainDataModule(StreamDataModule):
    """Packed rows of weighted text sources, the same rows a step for any number of ranks and loader workers.

    Each file is unpacked once into a cache folder (``MIXCN_CACHE``, else the user's), as plain text with an index; rows
    are tokenized while training goes on. A checkpoint holds the state of every stream, so resuming costs no replay.

    Args:
        sources: Training text, with weights.
        val_sources: Validation text; empty holds out `val_fraction` of the documents of each of `sources`.
        test_sources: Test text; empty holds out `test_fraction` of the documents of each of `sources`.
        predict_sources: Text for `predict`; each document is given once.
        sequence_length: Tokens of a row.
        micro_batch_size: Rows of a batch on one rank.
        num_streams: Number of parallel streams that documents are dealt to; the order of rows depends on it. At best a
            multiple of ranks times `micro_batch_size`, so that no rank tokenizes for another.
        num_workers: Processes of each rank that tokenize; 0 tokenizes in the training process.
        packing: Layout of documents in rows. `documents` cuts at the end of a row and isolates documents from each
            other, `best_fit` cuts only documents longer than a row and pads a little, `concatenate` isolates nothing.
        seed: Seed of the order of documents; the held-out sets do not depend on it.
        val_fraction: Share of the documents held out for validation, chosen by a hash of their text; 0 holds out none.
        test_fraction: Share of the documents held out for testing, chosen likewise.
        max_eval_rows: Most rows of each source that validation and test use, always the same; null uses all.
        on_bad_record: Treatment of a record that is no text: `error` names file and line, `skip` counts it and goes on.
        tokenizer: Folder of the tokenizer; null takes that of the module in the same Trainer.
        weight_unit: Unit of the sources' weights: `tokens`, or `bytes` of text, which mix the sources alike with every
            tokenizer.
        progress_rows: Rows of the run that weights by progress are fractions of; past them the last weights hold. Null
            takes `max_steps` times the rows of a step. Give it to resume with another number of steps or rows a step.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        val_sources: Sequence[Source] = (),
        test_sources: Sequence[Source] = (),
        predict_sources: Sequence[Source] = (),
        sequence_length: RowTokens = 4096,
        micro_batch_size: BatchRows = 4,
        num_streams: Streams = 64,
        num_workers: Workers = 2,
        packing: Packing = "documents",
        seed: Seed = 0,
        val_fraction: Share = 0.005,
        test_fraction: Share = 0.0,
        max_eval_rows: EvaluationRows | None = 256,
        on_bad_record: BadRecordPolicy = "error",
        tokenizer: Name | None = None,
        weight_unit: WeightUnit = "tokens",
        progress_rows: ProgressRows | None = None,
    ) -> None:
        """Check the arguments; files are read in `setup`."""
        check_arguments(PretrainDataModule, locals())
        held_out = {"val": (val_sources, val_fraction), "test": (test_sources, test_fraction)}
        super().__init__(
            StageDocuments(Source, sources, held_out, predict_sources, on_bad_record),
            sequence_length=sequence_length,
            micro_batch_size=micro_batch_size,
            num_streams=num_streams,
            num_workers=num_workers,
            packing=packing,
            seed=seed,
            max_eval_rows=max_eval_rows,
            tokenizer=tokenizer,
            weight_unit=weight_unit,
            progress_rows=progress_rows,
        )

    def make_encoder(self) -> PlainText:
        """Make tokens of whole texts."""
        return PlainText(self.tokenizer)

    def evaluation_documents(self, stage: str) -> list[DocumentSet]:
        """Get the documents of the set `val`, `test` or `predict`, one part a source; none if there is no such set."""
        return self._documents.read(stage, required=False)

"""Pairs of answers for preference optimisation, as a LightningDataModule with exact resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Literal, Protocol

from torch import Tensor

from lightning_mixcn.arguments import Name, RowTokens, Seed, Share, check_arguments
from lightning_mixcn.text import (
    BadRecordPolicy,
    ChatTemplate,
    DocumentSet,
    Preferences,
    PreferenceSource,
    StageDocuments,
    TooLongPairPolicy,
    Turn,
    collate_evaluation_rows,
    evaluation_rows,
    load_template,
)
from lightning_mixcn.text.chat.preferences import CHOSEN, load_preference

from .loaders import batch_tensors
from .module import BatchRows, EvaluationRows, StreamDataModule, Streams, Workers, try_template


class ReferenceLosses(Protocol):
    """Losses of the answers under the model that a run began with."""

    def nll(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return those of a batch on the CPU, ``[B, S]`` float32, 0 where there is no label."""


class PreferenceDataModule(StreamDataModule):
    """Pairs of a chosen and a rejected answer, or answers with a verdict; several pairs in a row, each one whole.

    Records have `prompt`, `chosen` and `rejected` (texts or messages), `conversations` with `chosen` and `rejected`,
    `completion` with a `label`, or `answers` with ratings. All else is as in InstructDataModule: unpacked once, the
    same rows a step for any number of ranks and loader workers, resumed exactly.

    Args:
        sources: Training pairs, with weights.
        val_sources: Validation pairs; empty holds out `val_fraction` of each of `sources`.
        test_sources: Test pairs; empty holds out `test_fraction` of each of `sources`.
        template: Chat template: `mixtral` (`<s>[INST] … [/INST] …</s>`), `tokenizer` for the chat
            template in the tokenizer's folder, or a Jinja file.
        on_too_long: Treatment of a pair longer than a row, prompt twice and both answers: `drop` drops it, `truncate`
            keeps the beginning of each side, so that the end of an answer is not learned. They are counted in
            `data/<source>/dropped` and `data/<source>/shortened`.
        sequence_length: Tokens of a row.
        micro_batch_size: Rows of a batch on one rank.
        num_streams: Number of parallel streams that pairs are dealt to; the order of rows depends on it. Each holds up
            to 64 pairs to choose from, so take few streams for a small set.
        num_workers: Processes of each rank that tokenize; 0 tokenizes in the training process.
        packing: Layout of pairs in rows. `best_fit` pads little, `documents` takes them in their order and begins a
            row where one does not fit; neither cuts one.
        seed: Seed of the order of pairs; the held-out sets do not depend on it.
        val_fraction: Share of the pairs held out for validation, chosen by a hash of their text.
        test_fraction: Share of the pairs held out for testing, chosen likewise.
        max_eval_rows: Most rows of each source that validation and test use, always the same; null uses all.
        on_bad_record: Treatment of a record that is no preference, has an empty answer or two that are the same, or
            that the template refuses: `error` names file and line, `skip` leaves it out and counts it.
        tokenizer: Folder of the tokenizer; null takes that of the module in the same Trainer.
    """

    def __init__(
        self,
        sources: Sequence[PreferenceSource],
        val_sources: Sequence[PreferenceSource] = (),
        test_sources: Sequence[PreferenceSource] = (),
        template: Name = "mixtral",
        on_too_long: TooLongPairPolicy = "drop",
        sequence_length: RowTokens = 4096,
        micro_batch_size: BatchRows = 4,
        num_streams: Streams = 8,
        num_workers: Workers = 2,
        packing: Literal["best_fit", "documents"] = "best_fit",
        seed: Seed = 0,
        val_fraction: Share = 0.02,
        test_fraction: Share = 0.0,
        max_eval_rows: EvaluationRows | None = 256,
        on_bad_record: BadRecordPolicy = "error",
        tokenizer: Name | None = None,
    ) -> None:
        """Check the arguments; files are read in `setup`."""
        check_arguments(PreferenceDataModule, locals())
        held_out = {"val": (val_sources, val_fraction), "test": (test_sources, test_fraction)}
        super().__init__(
            StageDocuments(PreferenceSource, sources, held_out, (), on_bad_record),
            sequence_length=sequence_length,
            micro_batch_size=micro_batch_size,
            num_streams=num_streams,
            num_workers=num_workers,
            packing=packing,
            seed=seed,
            max_eval_rows=max_eval_rows,
            tokenizer=tokenizer,
        )
        self.template_name = template
        self.on_too_long = on_too_long
        self.reference: ReferenceLosses | None = None  # computed before the first step, by the module

    def setup(self, stage: str | None = None) -> None:
        """Do what every data module does, and try the template on pairs of each source before training.

        Args:
            stage: See `StreamDataModule.setup`.

        Raises:
            ValueError: As there; or the template refuses a pair, see `try_template`.
        """
        is_first = self._plan is None
        super().setup(stage)
        if self._plan is not None and is_first:
            try_template(self._documents, self.make_encoder())

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Add ``reference_nll``, where it was computed before the first step."""
        if self.reference is None:
            return batch
        return batch | batch_tensors({"reference_nll": self.reference.nll(batch).numpy()})

    @property
    def template(self) -> ChatTemplate:
        """Chat template, known after `setup`."""
        return load_template(self.template_name, self.tokenizer)

    def make_encoder(self) -> Preferences:
        """Make tokens of pairs."""
        return Preferences(self.template, self.tokenizer, self.sequence_length, self.on_too_long)

    def evaluation_conversations(self, stage: str) -> list[list[list[Turn]]]:
        """Get prompts with their chosen answers, of the set `val` or `test`, by source; none if there is no such set.

        An answer with the verdict that it is bad is left out.
        """
        sets = self._documents.read(stage, required=False)
        found = [[load_preference(part.text(index)) for index in range(len(part))] for part in sets]
        return [
            [
                [*preference.prompt, Turn("assistant", preference.answers[0].text)]
                for preference in preferences
                if preference.answers[0].side == CHOSEN
            ]
            for preferences in found
        ]

    def every_pair(self) -> Iterator[dict[str, Tensor]]:
        """Give this rank's share of every pair of the run once, validation ones included, as evaluation batches.

        A reference's log-probabilities are computed of these, see `PreferenceModule`. Each rank gets as many batches.
        """
        encoder, shard = self.make_encoder(), self._shard()
        training = [
            DocumentSet(part.corpus, [index for index in range(len(part.corpus)) if index in part])
            for part in self._documents.training
        ]
        sets = [*training, *self._documents.read("val", required=False)]
        rows = chain.from_iterable(
            evaluation_rows(part, encoder, self.sequence_length, source=source) for source, part in enumerate(sets)
        )
        start = shard.rank * shard.micro_batch_size
        while group := list(islice(rows, shard.rows_a_batch)):
            own = group[start : start + shard.micro_batch_size]
            own += [()] * (shard.micro_batch_size - len(own))
            yield batch_tensors(collate_evaluation_rows(own, self.sequence_length, encoder.padding_id, has_sides=True))

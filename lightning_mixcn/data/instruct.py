"""Conversations for instruction tuning, as a LightningDataModule with exact resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_mixcn.arguments import Name, RowTokens, Seed, Share, check_arguments
from lightning_mixcn.text import (
    Answers,
    BadRecordPolicy,
    ChatTemplate,
    Conversations,
    ConversationSource,
    StageDocuments,
    TooLongPolicy,
    Turn,
    load_conversation,
    load_template,
)

from .module import BatchRows, EvaluationRows, ProgressRows, StreamDataModule, Streams, Workers, try_template


class InstructDataModule(StreamDataModule):
    """Conversations of weighted sources, several in a row and isolated from each other; only answers have labels.

    Records are alpaca's, ShareGPT's or OpenAI's messages, with several turns and a system prompt. All else is as in
    PretrainDataModule: unpacked once, the same rows a step for any number of ranks and loader workers, resumed exactly.

    Args:
        sources: Training conversations, with weights.
        val_sources: Validation conversations; empty holds out `val_fraction` of each of `sources`.
        test_sources: Test conversations; empty holds out `test_fraction` of each of `sources`.
        predict_sources: Conversations for `predict`; each is given once.
        template: Chat template: `mixtral` (`<s>[INST] … [/INST] …</s>`), `tokenizer` for the chat
            template in the tokenizer's folder, or a Jinja file.
        answers: Answers that are learned, each with its end token: `all` of a conversation, or the `last` one.
        on_too_long: Treatment of a conversation longer than a row: `cut_at_turn` keeps the exchanges from its
            beginning that fit, `truncate` keeps the tokens that fit and so no end of the last answer, `drop` drops it.
            They are counted in `data/<source>/shortened` and `data/<source>/dropped`.
        sequence_length: Tokens of a row.
        micro_batch_size: Rows of a batch on one rank.
        num_streams: Number of parallel streams that conversations are dealt to; the order of rows depends on it. Each
            holds up to 64 conversations to choose from, so take few streams for a small set.
        num_workers: Processes of each rank that tokenize; 0 tokenizes in the training process.
        packing: Layout of conversations in rows. `best_fit` pads little, `documents` takes them in their order and
            begins a row where one does not fit; neither cuts one.
        seed: Seed of the order of conversations; the held-out sets do not depend on it.
        val_fraction: Share of the conversations held out for validation, chosen by a hash of their text.
        test_fraction: Share of the conversations held out for testing, chosen likewise.
        max_eval_rows: Most rows of each source that validation and test use, always the same; null uses all.
        on_bad_record: Treatment of a record that is no conversation, that is flagged as not to be learned, or that
            the template refuses: `error` names file and line, `skip` leaves it out and counts it in `data/bad_records`,
            or, if the template refuses it, in `data/<source>/refused`. One with an empty turn is always left out.
        tokenizer: Folder of the tokenizer; null takes that of the module in the same Trainer.
        progress_rows: Rows of the run that weights by progress are fractions of; past them the last weights hold. Null
            takes `max_steps` times the rows of a step. Give it to resume with another number of steps or rows a step.
    """

    def __init__(
        self,
        sources: Sequence[ConversationSource],
        val_sources: Sequence[ConversationSource] = (),
        test_sources: Sequence[ConversationSource] = (),
        predict_sources: Sequence[ConversationSource] = (),
        template: Name = "mixtral",
        answers: Answers = "all",
        on_too_long: TooLongPolicy = "cut_at_turn",
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
        progress_rows: ProgressRows | None = None,
    ) -> None:
        """Check the arguments; files are read in `setup`."""
        check_arguments(InstructDataModule, locals())
        held_out = {"val": (val_sources, val_fraction), "test": (test_sources, test_fraction)}
        super().__init__(
            StageDocuments(ConversationSource, sources, held_out, predict_sources, on_bad_record),
            sequence_length=sequence_length,
            micro_batch_size=micro_batch_size,
            num_streams=num_streams,
            num_workers=num_workers,
            packing=packing,
            seed=seed,
            max_eval_rows=max_eval_rows,
            tokenizer=tokenizer,
            progress_rows=progress_rows,
        )
        self.template_name = template
        self.answers = answers
        self.on_too_long = on_too_long

    def setup(self, stage: str | None = None) -> None:
        """Do what every data module does, and try the template on conversations of each source before training.

        Args:
            stage: See `StreamDataModule.setup`.

        Raises:
            ValueError: As there; or the template refuses a conversation, see `try_template`.
        """
        is_first = self._plan is None
        super().setup(stage)
        if self._plan is not None and is_first:
            try_template(self._documents, self.make_encoder())

    @property
    def template(self) -> ChatTemplate:
        """Chat template, known after `setup`."""
        return load_template(self.template_name, self.tokenizer)

    def make_encoder(self) -> Conversations:
        """Make tokens of conversations."""
        return Conversations(self.template, self.tokenizer, self.sequence_length, self.on_too_long, self.answers)

    def evaluation_conversations(self, stage: str) -> list[list[list[Turn]]]:
        """Get the conversations of the set `val`, `test` or `predict`, by source; none if there is no such set."""
        sets = self._documents.read(stage, required=False)
        return [[load_conversation(part.text(index)) for index in range(len(part))] for part in sets]

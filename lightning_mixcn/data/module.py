"""The LightningDataModule of streams of documents, of any kind: rows in their order, and exact resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_mixcn.arguments import Between, Name, RowTokens, Seed, check_arguments
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.text import (
    BadRecordPolicy,
    DocumentEncoder,
    DocumentOrigin,
    EvaluationSet,
    Packing,
    Row,
    RowStream,
    StageDocuments,
    StreamPlan,
    TextTokenizer,
    WeightUnit,
    load_tokenizer,
)

from .loaders import EvaluationLoader, RankShard, RepeatedBatches, TrainLoader, overfit_batches
from .progress import Order, RunProgress, order_of

BatchRows = Annotated[int, Between(1, 2**16, "(rows of a batch on one rank)")]
Streams = Annotated[int, Between(1, 2**16, "(64 is a good number)")]
Workers = Annotated[int, Between(0, 1024, "(0 tokenizes in the training process)")]
EvaluationRows = Annotated[int, Between(1, 10**12, "(null for all)")]
ProgressRows = Annotated[int, Between(1, 10**12, "(null for max_steps times the rows of a step)")]
_TRIED_DOCUMENTS = 4096  # about a second and a half


class StreamDataModule(LightningDataModule):
    """Packed rows of weighted sources, the same rows a step for any number of ranks and loader workers.

    A subclass makes the encoder of its documents in `make_encoder`.

    Args:
        documents: Documents of each stage.
        sequence_length: Tokens of a row.
        micro_batch_size: Rows of a batch on one rank.
        num_streams: Number of parallel streams that the documents are dealt to.
        num_workers: Processes of each rank that tokenize.
        packing: Layout of documents in rows.
        seed: Seed of the order of documents.
        max_eval_rows: Rows of each source that validation and test use at most; None uses all.
        tokenizer: Folder of the tokenizer; null takes that of the module in the same Trainer.
        weight_unit: Unit of the sources' weights.
        progress_rows: Rows of the run that weights by progress are fractions of; None takes the trainer's.
    """

    def __init__(
        self,
        documents: StageDocuments,
        *,
        sequence_length: RowTokens,
        micro_batch_size: BatchRows,
        num_streams: Streams,
        num_workers: Workers,
        packing: Packing,
        seed: Seed,
        max_eval_rows: EvaluationRows | None,
        tokenizer: Name | None,
        weight_unit: WeightUnit = "tokens",
        progress_rows: ProgressRows | None = None,
    ) -> None:
        """Check the arguments; files are read in `setup`."""
        check_arguments(StreamDataModule, locals())
        super().__init__()
        self._documents = documents
        self.sequence_length, self.micro_batch_size = sequence_length, micro_batch_size
        self.num_streams, self.num_workers, self.max_eval_rows = num_streams, num_workers, max_eval_rows
        self.packing, self.weight_unit, self.seed = packing, weight_unit, seed
        self.progress_rows = progress_rows
        self.tokenizer_path = tokenizer
        self._tokenizer: TextTokenizer | None = None
        self._evaluation_sets: dict[str, EvaluationSet] = {}
        self._plan: StreamPlan | None = None
        self._train_loader: TrainLoader | None = None
        self._progress = RunProgress()
        self._unprepared: Exception | None = None

    def make_encoder(self) -> DocumentEncoder:
        """Make the encoder of the documents; `tokenizer` is there."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer; it is there after `setup`."""
        if self._tokenizer is None:
            raise UserError("The tokenizer is loaded by `setup`, which has not run. Call `setup` first")
        return self._tokenizer

    def prepare_data(self) -> None:
        """Unpack the sources that the stage needs, in one process of each machine.

        The other processes wait meanwhile for the next collective, so an error of this one is kept for `setup`, where
        each meets it.
        """
        stage = self.trainer.state.fn if self.trainer is not None else None
        try:
            self._documents.prepare(stage.value if stage is not None else "fit")
        except (ValueError, OSError) as error:
            if self.trainer is None or self.trainer.world_size == 1:
                raise
            self._unprepared = error

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer, read the sources that the stage needs, and hold out documents.

        Args:
            stage: `fit`, `validate`, `test` or `predict`, as Lightning says it; None sets up for `fit`.

        Raises:
            FileNotFoundError: The tokenizer or a source's files are missing.
            ValueError: No tokenizer or source is given, a file is damaged, or a set has no document.
        """
        if self._unprepared is not None:
            raise self._unprepared
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_path or self._folder_of_module())
        if stage not in ("fit", None):
            self._documents.prepare(stage)
        elif self._plan is None:
            if self.trainer is not None:
                _check_endless(self.trainer)
            self._documents.prepare("fit")
            self._plan = StreamPlan(
                self._documents.training, self.make_encoder(), self.sequence_length, self.num_streams, self.seed,
                self.packing, self.weight_unit, self._rows_of_trainer(),
            )  # fmt: skip
            self._progress.set_order(order_of(self._plan), self._plan)

    def _folder_of_module(self) -> Path:
        """Return the tokenizer's folder of the module that the same Trainer has."""
        module = None if self.trainer is None else self.trainer.lightning_module
        path: str | None = getattr(module, "tokenizer_path", None)  # a CausalLMModule's
        if path is None:
            raise UserError(
                "`tokenizer` is null. Give the folder of the model's tokenizer; a Trainer's data take that of a "
                "CausalLMModule themselves"
            )
        return local_folder(path)

    def train_dataloader(self) -> TrainLoader | RepeatedBatches:
        """Make the loader of training batches, which continues after the rows already trained on.

        Returns:
            Batches of `collate_rows`, as tensors ``[micro_batch_size, sequence_length]``; under
            `trainer.overfit_batches` always the same ones.
        """
        assert self._plan is not None, "Lightning calls setup('fit') first"
        self._check_progress_rows(self._plan)
        self.teardown("fit")  # the loader before, under `reload_dataloaders_every_n_epochs`
        trainer, progress = self.trainer, self._progress
        if is_overfit := overfit_batches(trainer) > 0:
            progress.begin(int, 0)  # the run stays where it is, and the loader reads from a copy
            progress = progress.copy()
        loader = TrainLoader(self._plan, progress, self._shard(), self.num_workers, trainer)
        self._train_loader = loader
        return RepeatedBatches(loader, trainer) if is_overfit and trainer is not None else loader

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Make the loader of validation batches; an empty list if there is no validation set."""
        return self._evaluation_loader("val") if self._documents.read("val", required=False) else []

    def test_dataloader(self) -> EvaluationLoader:
        """Make the loader of test batches."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """Make the loader that gives each document of `predict_sources` once."""
        return self._evaluation_loader("predict")

    def teardown(self, stage: str) -> None:
        """Stop the loader workers."""
        if stage == "fit" and self._train_loader is not None:
            self._train_loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """Stop the loader workers, which would live as long as the exception's traceback."""
        self.teardown("fit")

    def source_names(self, stage: str) -> list[str]:
        """List the sources that `source_ids` count.

        Args:
            stage: `train`, `val`, `test` or `predict`.

        Returns:
            The name of source 0, 1 and so on.
        """
        return self._documents.names(stage)

    def document_source(self, index: int, stage: str = "predict") -> DocumentOrigin:
        """Tell where a document of an evaluation set was read.

        Args:
            index: Index of the document in the set, ``document_index`` of a batch.
            stage: `val`, `test` or `predict`.

        Returns:
            Its source, file, and line or row.
        """
        return self._evaluation_set(stage).origin(index)

    def describe(self) -> dict[str, int]:
        """Count documents and UTF-8 bytes of each set and source that was set up.

        Returns:
            For example ``{"train/zh/documents": 1504, "train/zh/bytes": 24562707}``.
        """
        return self._documents.describe()

    def training_rows(self) -> Iterator[Row]:
        """Make the training rows in their order, from the first one of the run; what trains is not moved by it."""
        assert self._plan is not None, "Lightning calls setup('fit') first"
        streams = self._plan.open(range(self.num_streams))
        for number in count():
            yield streams[number % self.num_streams].next_row()

    def count_rows(
        self, on_row: Callable[[], object] = lambda: None, streams: Sequence[int] | None = None
    ) -> int | None:
        """Count the training rows of a whole run, by making them.

        Args:
            on_row: Called after each row that was made.
            streams: Numbers of the streams that are read; None reads all. Several processes can count a share of the
                streams each: the number of the whole is the largest of theirs.

        Returns:
            Rows until every source has been read `max_epochs` times, empty ones of streams that end early included;
            None if a source has no `max_epochs`.
        """
        assert self._plan is not None, "Lightning calls setup('fit') first"
        if any(documents.corpus.source.max_epochs is None for documents in self._plan.documents):
            return None
        last = -1
        for index, stream in self._plan.open(range(self.num_streams) if streams is None else streams).items():
            while not stream.exhausted:
                last = max(last, stream.position * self.num_streams + index)
                stream.next_row()
                on_row()
        return last + 1

    def order(self) -> Order:
        """Return what the sequence of training rows depends on."""
        assert self._plan is not None, "Lightning calls setup('fit') first"
        return order_of(self._plan)

    @property
    def rows_trained(self) -> int:
        """Rows that all ranks together have trained on since the beginning of the run."""
        return self._progress.rows

    @property
    def on_bad_record(self) -> BadRecordPolicy:
        """Policy for a bad record, `error` or `skip`."""
        return self._documents.on_bad_record

    @property
    def rows_a_batch(self) -> int:
        """Rows of a batch of all ranks together."""
        return self._shard().rows_a_batch

    def rows_of_progress(self, max_steps: int, rows_a_step: int) -> int | None:
        """Return the rows that weights by progress are fractions of: those given, else those of the run's steps.

        Args:
            max_steps: Steps of the run; -1 where they are not known.
            rows_a_step: Rows of a step, of all ranks and micro-batches together.

        Returns:
            The rows; None if every weight is constant.

        Raises:
            ValueError: Neither is known.
        """
        if not self._documents.by_progress:
            return None
        if self.progress_rows is None and max_steps < 1:
            raise UserError(
                f"`trainer.max_steps={max_steps}`: a `weight` of `sources` is by fraction of the run, whose rows are "
                "not known. Give `trainer.max_steps`, or the rows as `data.init_args.progress_rows`"
            )
        return self.progress_rows or max_steps * rows_a_step

    def epochs(self) -> dict[str, float]:
        """Count the epochs of each training source, such as ``{"zh": 0.25}``, in the streams that this rank reads."""
        assert self._plan is not None, "Lightning calls setup('fit') first"
        streams = self._progress.streams.values()
        newest = max((state["position"] for state in streams), default=0)
        current = [state["documents"] for state in streams if state["position"] >= newest - 1]
        return {
            part.name: sum(documents[index][0] for documents in current) / len(part.corpus) / max(1, len(current))
            for index, part in enumerate(self._plan.documents)
        }

    def token_shares(self, last_rows: int | None = None) -> dict[str, float]:
        """Return the share of tokens that the weights ask of each training source, such as ``{"zh": 0.55}``.

        Weights in bytes are turned into tokens by what the streams of this rank have read.

        Args:
            last_rows: Rows trained on last, over which weights by progress are averaged; None takes all of the run.
        """
        assert self._plan is not None, "Lightning calls setup('fit') first"
        stop = self.rows_trained
        weights = self._plan.mean_weights(range(max(0, stop - (last_rows or stop)), stop))
        shares = zip(*(stream.token_shares(weights) for stream in self._current_streams()), strict=True)
        return {name: sum(each) / len(each) for name, each in zip(self.source_names("train"), shares, strict=True)}

    def ended_sources(self) -> list[str]:
        """List the training sources that have been read `max_epochs` times in a stream of this rank."""
        names = self.source_names("train")
        return sorted({names[source] for stream in self._current_streams() for source in stream.ended_sources()})

    def _current_streams(self) -> list[RowStream]:
        """Open the streams that this rank has read, where they are; before the first row a new one."""
        assert self._plan is not None, "Lightning calls setup('fit') first"
        states = self._progress.streams
        return list(self._plan.open(sorted(states) or [0], states).values())

    def too_long(self) -> dict[str, tuple[int, int]]:
        """Count dropped and shortened documents of each training source, in the streams that this rank reads."""
        assert self._plan is not None, "Lightning calls setup('fit') first"
        counts = [state["too_long"] for state in self._progress.streams.values()]
        return {
            part.name: (sum(count[index][0] for count in counts), sum(count[index][1] for count in counts))
            for index, part in enumerate(self._plan.documents)
        }

    def refused(self) -> dict[str, int]:
        """Count documents of each training source that the encoder refused, in the streams that this rank reads."""
        assert self._plan is not None, "Lightning calls setup('fit') first"
        counts = [state["too_long"] for state in self._progress.streams.values()]
        return {part.name: sum(count[index][2] for count in counts) for index, part in enumerate(self._plan.documents)}

    def bad_records(self) -> int:
        """Count the records of the training sources that were skipped."""
        return sum(documents.corpus.bad_records for documents in self._documents.read_training())

    def state_dict(self) -> dict[str, Any]:
        """Return the rows trained on by all ranks together, the streams' states, and what their order depends on.

        Under several processes all must call it: each knows its own streams only.
        """
        return self._progress.state_dict(_of_all_ranks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the rows of a checkpoint, on any number of ranks and workers.

        Args:
            state_dict: State that `state_dict` returned.

        Raises:
            ValueError: The order of rows would be another; the message names what changed.
        """
        self._progress.load_state_dict(state_dict)

    def _rows_of_trainer(self) -> int | None:
        if (trainer := self.trainer) is None or not self._documents.by_progress:
            return self.rows_of_progress(-1, 0)
        return self.rows_of_progress(trainer.max_steps, self.rows_a_batch * trainer.accumulate_grad_batches)

    def _check_progress_rows(self, plan: StreamPlan) -> None:
        """Refuse a run whose steps a callback has set after the rows were planned."""
        if (rows := self._rows_of_trainer()) != plan.progress_rows:
            raise UserError(
                f"`trainer.max_steps` was {plan.progress_rows:,} rows and a callback, such as ByteBudget, has made it "
                f"{rows:,}: fractions of the run would be others. Give the rows of the run as `progress_rows`"
            )

    def _evaluation_set(self, stage: str) -> EvaluationSet:
        if stage not in self._evaluation_sets:
            documents, cap = self._documents.read(stage), None if stage == "predict" else self.max_eval_rows
            self._evaluation_sets[stage] = EvaluationSet(documents, self.make_encoder(), self.sequence_length, cap)
        return self._evaluation_sets[stage]

    def _evaluation_loader(self, stage: str) -> EvaluationLoader:
        shard = self._shard()
        return EvaluationLoader(self._evaluation_set(stage), shard.micro_batch_size, shard.num_ranks, shard.rank)

    def _shard(self) -> RankShard:
        """Make this rank's share of the rows; under tensor parallelism fewer ranks than all read different ones."""
        shares = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        num_ranks, rank = (shares["num_replicas"], shares["rank"]) if shares else (1, 0)
        return RankShard(self.micro_batch_size, num_ranks, rank)


class TemplateEncoder(Protocol):
    """Encoder that writes documents with a chat template."""

    def refusal(self, text: str) -> str | None:
        """Return the reason why the template refuses a document, or None."""


def try_template(documents: StageDocuments, encoder: TemplateEncoder) -> None:
    """Find what a template refuses before hours of training have passed.

    Args:
        documents: Documents of a run whose training sources are read.
        encoder: Encoder of its documents.

    Raises:
        ValueError: The template refuses one of the documents tried (all of them, where `on_bad_record` is `skip`). Of a
            source of more than 4,096, as many are tried, evenly spread; the others are refused when they are met.
    """
    corpora = [part.corpus for part in documents.training]
    held_out = documents.read("val", required=False)
    for corpus in [*corpora, *(part.corpus for part in held_out if part.corpus not in corpora)]:
        refused = list[tuple[int, str]]()
        tried = range(0, len(corpus), -(-len(corpus) // _TRIED_DOCUMENTS))
        for index in tried:
            if (reason := encoder.refusal(corpus.text(index))) is not None:
                if corpus.on_bad_record == "error":
                    corpus.refuse(index, reason)
                refused.append((index, reason))
        if len(refused) == len(tried):
            index, reason = refused[0]
            raise UserError(
                f"The template refuses each of the {len(tried)} conversations of source {corpus.source.name!r} that "
                f"were tried, such as {corpus.place(index)}: {reason}. Choose another `template`"
            )


def _of_all_ranks(mine: Any) -> list[Any]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


def _check_endless(trainer: Any) -> None:
    """Refuse what needs a length of the training data or epochs, neither of which a stream has.

    Raises:
        ValueError: A share of the training batches is asked for, or accumulation that changes with the epoch.
    """
    for name in ("overfit_batches", "limit_train_batches", "val_check_interval"):
        value = getattr(trainer, name, None)  # Lightning sets no `val_check_interval` that is a time
        if isinstance(value, float) and (0.0 < value < 1.0 or (name == "overfit_batches" and value)):
            raise UserError(
                f"`trainer.{name}={value}`: the stream of training rows has no end of which this could be a share. "
                "Give a number of batches, such as 10"
            )
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler) and max(callback.scheduling) > 0:
            raise UserError(
                f"`GradientAccumulationScheduler(scheduling={callback.scheduling})`: it counts epochs, which the "
                "stream of training rows has not. Set `trainer.accumulate_grad_batches`, and resume with another "
                "value to change it"
            )

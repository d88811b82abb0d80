"""Strings to token ids, label masks and packed rows, without torch.distributed and without Lightning."""

from lightning_mixcn.text.chat_template import ChatTemplate, Turn, load_template
from lightning_mixcn.text.collation import (
    IGNORED_LABEL,
    RowTable,
    collate_evaluation_rows,
    collate_rows,
    collate_table,
)
from lightning_mixcn.text.conversation_encoder import Answers, Conversations, TooLongPolicy
from lightning_mixcn.text.conversations import RecordFormat, load_conversation
from lightning_mixcn.text.corpus import Corpus, DocumentOrigin, read_corpus
from lightning_mixcn.text.document_set import DocumentSet, TrainingDocuments, all_documents, split_by_hash
from lightning_mixcn.text.encoders import DocumentEncoder, PlainText
from lightning_mixcn.text.packing import PACKINGS, Row, ScoredRow, evaluation_rows
from lightning_mixcn.text.portable_template import portable_source, template_of_model
from lightning_mixcn.text.sources import AnySource, ConversationSource, Source, SourceKind, parse_sources
from lightning_mixcn.text.stores import BadRecordPolicy
from lightning_mixcn.text.streams import RowStream, StreamPlan, StreamState, WeightUnit
from lightning_mixcn.text.tokenizer import TextTokenizer, load_tokenizer

__all__ = [
    "IGNORED_LABEL",
    "PACKINGS",
    "Answers",
    "AnySource",
    "BadRecordPolicy",
    "ChatTemplate",
    "ConversationSource",
    "Conversations",
    "Corpus",
    "DocumentEncoder",
    "DocumentOrigin",
    "DocumentSet",
    "PlainText",
    "RecordFormat",
    "Row",
    "RowStream",
    "RowTable",
    "ScoredRow",
    "Source",
    "SourceKind",
    "StreamPlan",
    "StreamState",
    "TextTokenizer",
    "TooLongPolicy",
    "TrainingDocuments",
    "Turn",
    "WeightUnit",
    "all_documents",
    "collate_evaluation_rows",
    "collate_rows",
    "collate_table",
    "evaluation_rows",
    "load_conversation",
    "load_template",
    "load_tokenizer",
    "parse_sources",
    "portable_source",
    "read_corpus",
    "split_by_hash",
    "template_of_model",
]

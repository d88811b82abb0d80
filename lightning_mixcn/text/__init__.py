"""Strings to token ids, label masks and packed rows, without torch.distributed and without Lightning."""

from lightning_mixcn.tokenizer.tokenizer import TextTokenizer, load_tokenizer

from .chat.portable import portable_source, template_of_model
from .chat.records import RecordFormat, load_conversation
from .chat.templates import load_template
from .chat.turns import ChatTemplate, Turn
from .corpus.documents import (
    DocumentSet,
    StageDocuments,
    TrainingDocuments,
    all_documents,
    split_by_hash,
)
from .corpus.sources import (
    AnySource,
    ConversationSource,
    PreferenceSource,
    Source,
    SourceKind,
    parse_sources,
)
from .corpus.store import BadRecordPolicy, Corpus, DocumentOrigin
from .corpus.unpack import read_corpus
from .rows.batches import (
    IGNORED_LABEL,
    Row,
    RowTable,
    ScoredRow,
    collate_evaluation_rows,
    collate_rows,
    collate_tables,
)
from .rows.encoders import Answers, Conversations, DocumentEncoder, PlainText, TooLongPolicy
from .rows.evaluation import EvaluationSet, evaluation_rows
from .rows.preferences import Preferences, TooLongPairPolicy
from .rows.streams import (
    PACKINGS,
    Packing,
    RowStream,
    StreamPlan,
    StreamState,
    WeightUnit,
)

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
    "EvaluationSet",
    "Packing",
    "PlainText",
    "PreferenceSource",
    "Preferences",
    "RecordFormat",
    "Row",
    "RowStream",
    "RowTable",
    "ScoredRow",
    "Source",
    "SourceKind",
    "StageDocuments",
    "StreamPlan",
    "StreamState",
    "TextTokenizer",
    "TooLongPairPolicy",
    "TooLongPolicy",
    "TrainingDocuments",
    "Turn",
    "WeightUnit",
    "all_documents",
    "collate_evaluation_rows",
    "collate_rows",
    "collate_tables",
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

"""Strings to token ids, label masks and packed rows, without torch.distributed and without Lightning."""

from lightning_mixcn.text.corpus import (
    Corpus,
    DocumentOrigin,
    DocumentSet,
    all_documents,
    read_corpus,
    split_by_hash,
)
from lightning_mixcn.text.packing import (
    IGNORED_LABEL,
    PACKINGS,
    Row,
    ScoredRow,
    collate_evaluation_rows,
    collate_rows,
    evaluation_rows,
)
from lightning_mixcn.text.sources import Source, parse_sources
from lightning_mixcn.text.streams import RowStream, StreamPlan
from lightning_mixcn.text.tokenizer import TextTokenizer, load_tokenizer

__all__ = [
    "IGNORED_LABEL",
    "PACKINGS",
    "Corpus",
    "DocumentOrigin",
    "DocumentSet",
    "Row",
    "RowStream",
    "ScoredRow",
    "Source",
    "StreamPlan",
    "TextTokenizer",
    "all_documents",
    "collate_evaluation_rows",
    "collate_rows",
    "evaluation_rows",
    "load_tokenizer",
    "parse_sources",
    "read_corpus",
    "split_by_hash",
]

"""What is studied about an adapted model beyond its loss. Nothing here knows a trainer."""

from .long_context.likelihood import (
    DocumentRow,
    LengthLikelihood,
    LongContextResult,
    evaluate_lengths,
    longest_documents,
)
from .long_context.retrieval import RETRIEVAL_TASKS, RetrievalResult, check_room, evaluate_retrieval

__all__ = [
    "RETRIEVAL_TASKS",
    "DocumentRow",
    "LengthLikelihood",
    "LongContextResult",
    "RetrievalResult",
    "check_room",
    "evaluate_lengths",
    "evaluate_retrieval",
    "longest_documents",
]

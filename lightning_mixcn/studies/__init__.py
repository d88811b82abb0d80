"""What is studied about an adapted model beyond its loss. Nothing here knows a trainer."""

from .document_rows import DocumentRow, longest_documents
from .long_context import LengthLikelihood, LongContextResult, evaluate_lengths
from .retrieval import RetrievalResult, check_room, evaluate_retrieval
from .retrieval_texts import RETRIEVAL_TASKS

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

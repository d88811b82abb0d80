"""Sums and counts that become numbers with a unit. Nothing here knows a model, a file or a trainer."""

from .answers import AnswerFigures, answer_figures
from .likelihood import DocumentScores, Likelihood, SourceLikelihood, score_documents, scored_positions

__all__ = [
    "AnswerFigures",
    "DocumentScores",
    "Likelihood",
    "SourceLikelihood",
    "answer_figures",
    "score_documents",
    "scored_positions",
]

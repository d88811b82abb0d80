"""Sums and counts that become numbers with a unit. Nothing here knows a model, a file or a trainer."""

from .answers import AnswerFigures, answer_figures
from .likelihood import DocumentScores, Likelihood, SourceLikelihood, score_documents, scored_positions
from .pairs import PairScores, SourcePairs, pair_figures, pair_sums, score_pairs

__all__ = [
    "AnswerFigures",
    "DocumentScores",
    "Likelihood",
    "PairScores",
    "SourceLikelihood",
    "SourcePairs",
    "answer_figures",
    "pair_figures",
    "pair_sums",
    "score_documents",
    "score_pairs",
    "scored_positions",
]

"""Sums and counts that become numbers with a unit. Nothing here knows a model, a file or a trainer."""

from .answers import AnswerFigures, answer_figures
from .likelihood import (
    DocumentScores,
    Likelihood,
    SourceLikelihood,
    overall_bits_per_byte,
    score_documents,
    scored_positions,
)
from .pairs import PairScores, SourcePairs, pair_figures, pair_sums, score_pairs

__all__ = [
    "AnswerFigures",
    "DocumentScores",
    "Likelihood",
    "PairScores",
    "SourceLikelihood",
    "SourcePairs",
    "answer_figures",
    "overall_bits_per_byte",
    "pair_figures",
    "pair_sums",
    "score_documents",
    "score_pairs",
    "scored_positions",
]

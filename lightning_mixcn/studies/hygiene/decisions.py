"""Which documents go, and why: the first reason that holds, and of copies all but the first that stays."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .characters import DENSE_SHINGLE, SCRIPT_NAMES, SHINGLE, Hashes
from .options import HygieneOptions
from .scan import COUNTED, Scan, Texts, distinct_shingles_of
from .signatures import BANDS, ROWS, Pairs, changed_of, jaccard_of

REASONS = ("letters", "digits", "markup", "replaced", "scripts", "question", "exact", "near")
KEPT = -1
# Documents whose shingles are kept in memory while pairs are compared.
_HELD = 512


class Decisions(NamedTuple):
    """What becomes of each document.

    Args:
        reasons: Number of the reason in `REASONS`, `KEPT` where it stays ``[D]``.
        others: Document that it is a copy of, or number of the question, or -1 ``[D]``.
        values: What was compared with the threshold: a share, or the letters ``[D]``.
    """

    reasons: NDArray[np.int8]
    others: NDArray[np.int64]
    values: NDArray[np.float64]


def decide(texts: Texts, scan: Scan, options: HygieneOptions) -> Decisions:
    """Decide on every document; the answer depends on the texts, their order and the options alone."""
    size = len(texts)
    decisions = Decisions(np.full(size, KEPT, np.int8), np.full(size, -1), np.zeros(size))
    _drop_noise(decisions, scan, options)
    _drop_contaminated(decisions, scan, options.question_share)
    if options.exact:
        _drop_equal(decisions, scan)
    if options.max_changed > 0 and scan.signatures is not None:
        _drop_near(decisions, texts, scan, options.max_changed)
    return decisions


def _drop(decisions: Decisions, reason: str, is_bad: NDArray[np.bool_], values: NDArray[np.float64]) -> None:
    going = is_bad & (decisions.reasons == KEPT)
    decisions.reasons[going] = REASONS.index(reason)
    decisions.values[going] = values[going]


def _drop_noise(decisions: Decisions, scan: Scan, options: HygieneOptions) -> None:
    counts = {name: scan.counts[:, place].astype(np.float64) for place, name in enumerate(COUNTED)}
    _drop(decisions, "letters", counts["letters"] < options.min_letters, counts["letters"])
    most = {"digits": options.max_digits, "markup": options.max_markup, "replaced": options.max_replaced}
    for name, limit in most.items():
        share = counts[name] / np.maximum(counts["characters"], 1)
        _drop(decisions, name, share > limit, share)
    if options.scripts is not None:
        wanted = [SCRIPT_NAMES.index(name) for name in options.script_names]
        share = scan.letters[:, wanted].sum(axis=1) / np.maximum(scan.letters.sum(axis=1), 1)
        _drop(decisions, "scripts", share < options.min_scripts, share)


def _drop_contaminated(decisions: Decisions, scan: Scan, least: float) -> None:
    for document, question, share in scan.overlaps:
        number = int(document)
        if share >= least and share > decisions.values[number] and decisions.reasons[number] in (KEPT, _QUESTION):
            decisions.reasons[number], decisions.others[number] = _QUESTION, int(question)
            decisions.values[number] = share


_QUESTION = REASONS.index("question")


def _drop_equal(decisions: Decisions, scan: Scan) -> None:
    left = np.flatnonzero((decisions.reasons == KEPT) & (scan.counts[:, COUNTED.index("letters")] > 0))
    hashes = scan.hashes
    order = np.lexsort((left, hashes[left, 1], hashes[left, 0]))
    arranged = hashes[left][order]
    begins = np.append(True, (arranged[1:] != arranged[:-1]).any(axis=1))
    first = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    copies, originals = left[order[~begins]], left[first[~begins]]
    decisions.reasons[copies], decisions.others[copies] = REASONS.index("exact"), originals


def _drop_near(decisions: Decisions, texts: Texts, scan: Scan, changed: float) -> None:
    """Remove each document that is near an earlier one that stays, so that no chain of small changes takes all."""
    limits = np.array([jaccard_of(changed, SHINGLE), jaccard_of(changed, DENSE_SHINGLE)])
    left = np.flatnonzero((decisions.reasons == KEPT) & (scan.shingles > 0))
    pairs = _promising(left, scan, limits)
    shingles_of = lru_cache(_HELD)(lambda number: distinct_shingles_of(texts, number))
    for first, second in tqdm(pairs.tolist(), desc="comparing", unit=" pairs", delay=1):
        if decisions.reasons[first] != KEPT:
            continue
        share = _jaccard(shingles_of(first), shingles_of(second))
        dense = bool(scan.is_dense[second])
        if share >= limits[int(dense)] and (
            decisions.reasons[second] == KEPT or share > jaccard_of(decisions.values[second], _size(dense))
        ):
            decisions.reasons[second], decisions.others[second] = REASONS.index("near"), first
            decisions.values[second] = changed_of(share, _size(dense))


def _size(is_dense: bool) -> int:
    return DENSE_SHINGLE if is_dense else SHINGLE


def _promising(left: NDArray[np.int64], scan: Scan, limits: NDArray[np.float64]) -> Pairs:
    """Return candidates whose signatures do not rule them out, by their later document and then the earlier one."""
    assert scan.signatures is not None
    kept = [np.zeros((0, 2), np.int64)]
    for pairs in scan.signatures.candidates(left, scan.is_dense[left]):
        least = limits[scan.is_dense[pairs[:, 1]].astype(int)]
        sizes = scan.shingles[pairs].astype(np.float64)
        pairs = pairs[sizes.min(axis=1) / sizes.max(axis=1) >= least]
        least = limits[scan.is_dense[pairs[:, 1]].astype(int)]
        # Three standard deviations of the estimate.
        slack = 3 * np.sqrt(least * (1 - least) / (BANDS * ROWS))
        kept.append(pairs[scan.signatures.agreement(pairs) >= least - slack])
    together = np.unique(np.concatenate(kept), axis=0)
    return together[np.lexsort((together[:, 0], together[:, 1]))]


def _jaccard(first: Hashes, second: Hashes) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)

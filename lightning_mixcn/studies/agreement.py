"""How much judges agree beyond chance.

Legend: J judges, I items, C categories.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def observed_agreement(verdicts_JI: ArrayLike) -> float | None:
    """Share of pairs of verdicts on the same item that are equal.

    Args:
        verdicts_JI: Whole numbers ``[J, I]``, one a category; negative where a verdict is missing.

    Returns:
        ``None`` if no item has two verdicts.
    """
    counts_IC = _counts(verdicts_JI)
    pairs = (counts_IC.sum(1) * (counts_IC.sum(1) - 1)).sum()
    return float((counts_IC * (counts_IC - 1)).sum() / pairs) if pairs else None


def cohen_kappa(first_I: ArrayLike, second_I: ArrayLike) -> float | None:
    """Agreement of two judges (Cohen 1960), over the items that both have judged.

    Args:
        first_I: Whole numbers ``[I]``, one a category; negative where a verdict is missing.
        second_I: The same of the other judge.

    Returns:
        1 for equal verdicts, 0 for chance; ``None`` if there are none, or all are of one category, so that nothing but
        agreement was possible.
    """
    one_I, two_I = np.asarray(first_I), np.asarray(second_I)
    both_I = (one_I >= 0) & (two_I >= 0)
    if not both_I.any():
        return None
    one_I, two_I = one_I[both_I], two_I[both_I]
    by_chance = sum(float((one_I == c).mean() * (two_I == c).mean()) for c in np.unique([one_I, two_I]))
    return None if by_chance == 1 else (float((one_I == two_I).mean()) - by_chance) / (1 - by_chance)


def krippendorff_alpha(verdicts_JI: ArrayLike) -> float | None:
    """Agreement of any number of judges, some of whose verdicts may be missing (Krippendorff 2011, nominal data).

    Args:
        verdicts_JI: Whole numbers ``[J, I]``, one a category; negative where a verdict is missing.

    Returns:
        1 for equal verdicts, 0 for chance; ``None`` if no item has two verdicts, or all verdicts are of one category.
    """
    counts_IC = _counts(verdicts_JI)
    counts_IC = counts_IC[counts_IC.sum(1) > 1]
    total_C = counts_IC.sum(0)
    expected = float((total_C * (total_C.sum() - total_C)).sum())
    if not expected:
        return None
    size_I1 = counts_IC.sum(1, keepdims=True)
    differ = float((counts_IC * (size_I1 - counts_IC) / (size_I1 - 1)).sum())
    return 1 - (float(total_C.sum()) - 1) * differ / expected


def _counts(verdicts_JI: ArrayLike) -> NDArray[np.int64]:
    """How many judges chose each category, ``[I, C]``."""
    chosen_JI = np.asarray(verdicts_JI)
    categories = range(int(chosen_JI.max(initial=0)) + 1)
    return np.stack([(chosen_JI == category).sum(0) for category in categories], axis=1).astype(np.int64)

"""Text as arrays of code points: folded letters, script classes, shingles and tokens, all by numpy.

Legend: C characters of a text, L letters and digits in it, W words, G shingles or n-grams.
"""

import unicodedata
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint32]
Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]

# By the beginning of a letter's name in Unicode's database, which Python carries: no model to download, and the same
# answer everywhere. A script is no language: English and German are both Latin. What tells these apart is a model,
# such as fastText's lid.176 of 126 MB; for a base's English and a script of its own, the script is enough.
SCRIPTS = {
    "Han": ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC"),
    "Kana": ("HIRAGANA", "KATAKANA"),
    "Hangul": ("HANGUL",),
    "Latin": ("LATIN",),
    "Cyrillic": ("CYRILLIC",),
    "Greek": ("GREEK",),
    "Arabic": ("ARABIC",),
    "Hebrew": ("HEBREW",),
    "Thai": ("THAI",),
    "Devanagari": ("DEVANAGARI",),
}
SCRIPT_NAMES = (*SCRIPTS, "other")
# The first classes are the scripts', in their order.
_DIGIT, _MARK, _NO_LETTER = len(SCRIPT_NAMES), len(SCRIPT_NAMES) + 1, len(SCRIPT_NAMES) + 2
_CLASSES = _NO_LETTER + 1
_DENSE = 3  # Han, Kana and Hangul: one character is a word or a syllable
_PLANES = 0x34000  # beyond it Unicode has no letters

DENSE_SHINGLE, SHINGLE = 4, 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15))


class Text(NamedTuple):
    """A text taken apart.

    Args:
        classes: Class of each character ``[C]``, uint8: a script, a digit, a mark or none of these.
        places: Place of each letter, mark or digit among the characters ``[L]``.
        letters: These folded, as NFKC and ``casefold`` have them where that is one character ``[L]``.
        newlines: Places of line ends among the characters.
    """

    classes: NDArray[np.uint8]
    places: Places
    letters: Codes
    newlines: Places

    @property
    def is_dense(self) -> bool:
        """Tell whether most letters are Han, kana or Hangul."""
        scripts = np.bincount(self.classes, minlength=_CLASSES)
        return bool(2 * scripts[:_DENSE].sum() > scripts[: len(SCRIPT_NAMES)].sum())


@lru_cache(maxsize=1)
def _tables() -> tuple[NDArray[np.uint8], Codes]:
    """Return class and folded form of each code point below `_PLANES`."""
    classes = np.full(_PLANES, _NO_LETTER, np.uint8)
    folded = np.arange(_PLANES, dtype=np.uint32)
    for code in range(_PLANES):
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] not in "LNM":
            continue
        plain = unicodedata.normalize("NFKC", character).casefold()
        if len(plain) == 1 and ord(plain) < _PLANES:
            folded[code] = ord(plain)
        name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
        known = (number for number, starts in enumerate(SCRIPTS.values()) if name.startswith(starts))
        fallback = {"L": len(SCRIPTS), "N": _DIGIT, "M": _MARK}[category[0]]
        classes[code] = next(known, fallback) if category[0] == "L" or category == "Nl" else fallback
    return classes, folded


def take_apart(text: str) -> Text:
    """Take a text apart; spaces, punctuation and symbols are left out of its letters."""
    classes_of, folded = _tables()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    known = np.minimum(codes, _PLANES - 1)  # the last one is no letter
    classes = classes_of[known]
    places = np.flatnonzero(classes != _NO_LETTER)
    return Text(classes, places, folded[known[places]], np.flatnonzero(codes == ord("\n")))


def count_scripts(text: Text) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Count a text's letters and lines by script.

    Returns:
        Letters of each script ``[len(SCRIPT_NAMES)]``; lines whose letters are mostly of each script, where Han beside
        kana, at least one in ten, is Kana, for that is Japanese; and digits.
    """
    size = len(text.newlines) + 1
    line_of = np.searchsorted(text.newlines, text.places)
    flat = np.bincount(line_of * _CLASSES + text.classes[text.places], minlength=size * _CLASSES)
    by_line = flat.reshape(size, _CLASSES)
    letters = by_line[:, : len(SCRIPT_NAMES)]
    shown = letters.copy()
    is_japanese = shown[:, 1] * 10 >= shown[:, 0] + shown[:, 1]
    shown[:, 1] += np.where(is_japanese, shown[:, 0], 0)
    lines = np.bincount(shown.argmax(axis=1)[shown.any(axis=1)], minlength=len(SCRIPT_NAMES))
    return letters.sum(axis=0), lines, int(by_line[:, _DIGIT].sum())


def mix(values: Hashes) -> Hashes:
    """Mix bits as SplitMix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators")."""
    values = values + _MIX[2]
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    mixed: Hashes = values ^ (values >> np.uint64(31))
    return mixed


def windows(values: Hashes, size: int) -> Hashes:
    """Hash every run of ``size`` values ``[L]``: ``[L - size + 1]``, empty where there are fewer."""
    count = max(0, len(values) - size + 1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(size):
        hashes = (hashes ^ values[offset : offset + count]) * _MIX[0]
        hashes ^= hashes >> np.uint64(29)
    return hashes


def shingles(text: Text, is_dense: bool) -> Hashes:
    """Hash runs of letters ``[G]``: of 4 where most are Han, kana or Hangul, else of 6."""
    return windows(mix(text.letters.astype(np.uint64)), DENSE_SHINGLE if is_dense else SHINGLE)


def segment_hashes(letters: Codes, starts: Places) -> Hashes:
    """Hash the segments of some letters that begin at ``starts``, the first at 0 and each at another place."""
    if not len(letters):
        return np.zeros(0, np.uint64)
    lengths = np.diff(np.append(starts, len(letters)))
    within = np.arange(len(letters)) - np.repeat(starts, lengths)
    each = mix(mix(letters.astype(np.uint64)) + within.astype(np.uint64))
    return mix(np.add.reduceat(each, starts))


def token_hashes(text: Text) -> Hashes:
    """Hash words ``[W]``: runs of letters and digits, but each character of Han, kana and Hangul alone."""
    if not len(text.places):
        return np.zeros(0, np.uint64)
    is_alone = text.classes[text.places] < _DENSE
    begins = np.ones(len(text.places), bool)
    begins[1:] = is_alone[1:] | is_alone[:-1] | (np.diff(text.places) > 1)
    return segment_hashes(text.letters, np.flatnonzero(begins))


def line_hashes(text: Text) -> Hashes:
    """Hash the letters of each line that has any, and of the whole text as the last."""
    if not len(text.places):
        return np.zeros(0, np.uint64)
    line_of = np.searchsorted(text.newlines, text.places)
    starts = np.flatnonzero(np.append(True, np.diff(line_of) > 0))
    return np.append(segment_hashes(text.letters, starts), segment_hashes(text.letters, np.zeros(1, np.int64)))

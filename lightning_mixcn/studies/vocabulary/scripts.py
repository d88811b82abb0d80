"""Which script a character belongs to, by its name in the Unicode character database of Python itself."""

import sys
import unicodedata

from lightning_mixcn.errors import UserError

# What stands for a script in the names of its characters, where that is not its own name: "CJK UNIFIED IDEOGRAPH-4E2D".
_HAN = ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC NUMBER ZERO", "IDEOGRAPHIC ITERATION MARK")
# First words of letters' names that are no script's.
_NO_SCRIPTS = {
    "CJK", "DIGIT", "DOUBLE", "FEMININE", "FULLWIDTH", "HALFWIDTH", "IDEOGRAPHIC", "MASCULINE", "MATHEMATICAL", "MICRO",
    "MODIFIER", "SQUARED", "VERTICAL",
}  # fmt: skip


class ScriptFilter:
    """Keeps the characters of some scripts.

    Args:
        scripts: Names as Unicode has them, joined by ``+``, such as ``Han``, ``Cyrillic`` or ``Hiragana+Katakana+Han``;
            ``any`` keeps every character.

    Raises:
        ValueError: no letter belongs to such a script.
    """

    def __init__(self, scripts: str) -> None:
        """Check the names."""
        names = [name.strip() for name in scripts.split("+")]
        self._prefixes: tuple[str, ...] = ()
        self._any = [name.lower() for name in names] == ["any"]
        self._known: dict[str, bool] = {}
        for name in names if not self._any else ():
            prefixes = _HAN if name.lower() == "han" else (f"{name.upper()} ",)
            if not _has_letters(prefixes):
                raise UserError(
                    f"`script={scripts!r}`: Unicode has no script {name!r}. Give names such as Han, Cyrillic, Hangul, "
                    "Arabic, Thai, Devanagari, Greek or Latin, several joined by +, or any"
                )
            self._prefixes += prefixes

    def __contains__(self, character: str) -> bool:
        """Tell whether a character belongs to one of the scripts."""
        if character not in self._known:
            name = unicodedata.name(character, "")
            self._known[character] = self._any or name.startswith(self._prefixes)
        return self._known[character]

    def covers(self, piece: str) -> bool:
        """Tell whether a piece, without the visible blank (U+2581) in front, has characters of the scripts alone."""
        body = piece.removeprefix("▁")
        return bool(body) and all(character in self for character in body)


def _has_letters(prefixes: tuple[str, ...]) -> bool:
    if prefixes[0].strip() in {"", *_NO_SCRIPTS}:
        return False
    return any(
        unicodedata.category(character)[0] == "L" and unicodedata.name(character, "").startswith(prefixes)
        for character in map(chr, range(sys.maxunicode + 1))
    )

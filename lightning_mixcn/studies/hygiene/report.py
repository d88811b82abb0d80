"""What was found, as JSON and as one page of HTML that loads nothing."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from lightning_mixcn.files.atomic import write_json, write_text
from lightning_mixcn.masking import mask_secrets, visible, without_secrets

from .characters import SCRIPT_NAMES
from .decisions import KEPT, REASONS, Decisions
from .questions import Question
from .scan import COUNTED, Scan, Texts

_SHOWN, _SHOWN_CHARACTERS = 50, 200
_QUANTILES = {"5 %": 0.05, "50 %": 0.5, "95 %": 0.95, "100 %": 1.0}
MEANINGS = {
    "letters": "too few letters",
    "digits": "too many digits",
    "markup": "too much markup",
    "replaced": "too many replacement characters",
    "scripts": "other scripts",
    "question": "a benchmark's question",
    "exact": "an exact copy",
    "near": "a near copy",
}


class Findings(NamedTuple):
    """All that a report is made of.

    Args:
        texts: The documents.
        scan: Figures of each.
        decisions: What becomes of each.
        questions: Questions of `against`.
        ignored: How many of these are too short to look for.
    """

    texts: Texts
    scan: Scan
    decisions: Decisions
    questions: Sequence[Question]
    ignored: int


def summarise(findings: Findings) -> dict[str, Any]:
    """Sum up each source: counts, shares, quantiles and a histogram of lengths, scripts, and what goes for what reason.

    Returns:
        Content of the JSON report but for the settings. Shares are of characters, those of scripts of letters, and of
        the lines that have any.
    """
    texts = findings.texts
    sources = {
        corpus.source.name: _of_source(findings, number, slice(start, start + len(corpus)))
        for number, (corpus, start) in enumerate(zip(texts.corpora, texts.starts, strict=False))
    }
    touched = {int(question) for question in findings.scan.overlaps[:, 1]}
    return {
        "sources": sources,
        "questions": {
            "asked": len(findings.questions),
            "too_short": findings.ignored,
            "with_an_overlap": len(touched),
            "documents_with_an_overlap": len(np.unique(findings.scan.overlaps[:, 0])),
        },
    }


def _of_source(findings: Findings, number: int, part: slice) -> dict[str, Any]:
    scan, corpus = findings.scan, findings.texts.corpora[number]
    counts, reasons = scan.counts[part].astype(np.int64), findings.decisions.reasons[part]
    total = dict(zip(COUNTED, counts.sum(axis=0).tolist(), strict=True))
    lengths = counts[:, COUNTED.index("characters")]
    edges = 2 ** np.arange(0, int(lengths.max()).bit_length() + 1)
    removed = {name: int((reasons == place).sum()) for place, name in enumerate(REASONS)}
    return {
        "documents": len(lengths),
        "bytes": corpus.total_bytes,
        **total,
        "share_of_digits": total["digits"] / total["characters"],
        "share_of_markup": total["markup"] / total["characters"],
        "share_of_replacement_characters": total["replaced"] / total["characters"],
        "letters_by_script": _shares(scan.letters[part].sum(axis=0, dtype=np.int64)),
        "lines_by_script": _shares(scan.lines[number]),
        "characters_of_a_document": {
            name: int(np.quantile(lengths, at, method="lower")) for name, at in _QUANTILES.items()
        },
        "documents_by_characters": {
            f"{low}-{high - 1}": int(((lengths >= low) & (lengths < high)).sum())
            for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        },
        "removed": removed,
        "kept_documents": int((reasons == KEPT).sum()),
        "kept_characters": int(lengths[reasons == KEPT].sum()),
    }


def _shares(counts: NDArray[np.int64]) -> dict[str, float]:
    total = max(int(counts.sum()), 1)
    return {name: int(count) / total for name, count in zip(SCRIPT_NAMES, counts, strict=True) if count}


def write_report(folder: Path, summary: Mapping[str, Any], findings: Findings, settings: Mapping[str, Any]) -> None:
    """Write report.json and report.html."""
    settings = without_secrets(dict(settings))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = (files(__package__) / "report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        summary=summary, settings=settings, meanings=MEANINGS, examples=_examples(findings), shown=_SHOWN
    )
    write_text(folder / "report.html", page)
    write_json(folder / "report.json", {**summary, "settings": settings})


def _examples(findings: Findings) -> dict[str, list[dict[str, str]]]:
    """Return the first documents that go for each reason, with what they are compared with."""
    decisions, found = findings.decisions, dict[str, list[dict[str, str]]]()
    for place, name in enumerate(REASONS):
        for number in np.flatnonzero(decisions.reasons == place)[:_SHOWN].tolist():
            other = int(decisions.others[number])
            if name == "question":
                against = findings.questions[other]._asdict()
            elif other >= 0:
                against = _example(findings.texts, other)
            else:
                against = {"place": "", "text": ""}
            entry = _example(findings.texts, number) | {
                "value": f"{decisions.values[number]:.3g}",
                "other": _shown(against["place"]),
                "other_text": _shown(against["text"]),
            }
            found.setdefault(name, []).append(entry)
    return found


def _example(texts: Texts, number: int) -> dict[str, str]:
    origin = texts.origin(number)
    return {"place": _shown(f"{origin.file}:{origin.record}"), "text": _shown(texts.text(number))}


def _shown(text: str) -> str:
    """Return the beginning of a text, fit to be seen; a secret is masked before it is cut in two."""
    safe = visible(mask_secrets(text[: 10 * _SHOWN_CHARACTERS]))
    return safe if len(safe) <= _SHOWN_CHARACTERS else f"{safe[:_SHOWN_CHARACTERS]}…"

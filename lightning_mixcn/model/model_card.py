"""README of an adapter or an exported model: what it was made of, and what the run measured."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .identity import read_identity
from .model_source import ADAPTER_FOLDER, ModelSource

CARD_NAME = "README.md"
_REPORT = "validate.json"


def adapter_card(folder: Path, base: str, steps: int, measured: Mapping[str, Any]) -> str:
    """Write the card of an adapter that a run saves.

    Args:
        folder: Where the adapter is.
        base: What the run was given as its base.
        steps: Optimizer steps of the adapter.
        measured: ``step`` and ``sources`` (by name: ``nll_nats_per_token``, ``bits_per_byte``, ``tokens``) of the run's
            last validation; empty if there was none.
    """
    name = _public_name(base)
    made = f"A LoRA adapter after {steps:,} optimizer steps, one pair of factors an expert."
    parts = [_header(name, "peft"), made, _base_line(folder, name)]
    if measured:
        parts.append(_table(measured["sources"], f"Measured after {measured['step']:,} steps:"))
    return "\n\n".join(parts) + "\n"


def model_card(found: ModelSource, src: str, made: str, library: str) -> str:
    """Write the card of an export. It has no date and no absolute path, so the same export gives the same bytes.

    Args:
        found: What was exported.
        src: What the person named; a run's ``validate.json`` is looked for there.
        made: How it was made, as sentences.
        library: ``transformers`` or ``peft``, for the hub's ``library_name``.
    """
    base = _public_name(found.base)
    first = Path(found.adapters[0]) if found.adapters else None
    parts = [_header(base, library), made, _base_line(first, base)]
    parts += filter(None, [_figures(src), *(_adapter_text(adapter) for adapter in found.adapters)])
    return "\n\n".join(parts) + "\n"


def _header(base: str, library: str) -> str:
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [mixtral, moe]"]
    if "/" in base:
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "---", "", f"# {base}, adapted"])


def _public_name(path: str) -> str:
    """A hub id as it is, a folder without the path of this machine."""
    return Path(path).name if Path(path).expanduser().is_dir() else path


def _base_line(made_from: Path | None, base: str) -> str:
    identity = read_identity(made_from) if made_from else None
    content = f" (content hash `{identity['sha256']}`)" if identity else ""
    return f"Base: `{base}`{content}."


def _figures(src: str) -> str | None:
    """Table of the likelihoods that `mixcn validate` wrote into the run's folder."""
    folder = Path(src).expanduser()
    runs = [folder, folder.parent] if folder.name == ADAPTER_FOLDER else [folder]
    reports = [run / _REPORT for run in runs if (run / _REPORT).is_file()]
    if not reports:
        return None
    try:
        report = json.loads(reports[0].read_text(encoding="utf-8"))
        return _table(report["sources"], f"Measured on the run after {report['steps_trained']} steps, before export:")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(reports[0])!r} is not what `mixcn validate` writes. Delete it or run it again"
        ) from error


def _table(sources: Mapping[str, Mapping[str, Any]], says: str) -> str:
    rows = [_row(name, result) for name, result in sorted(sources.items())]
    return "\n".join(
        [says, "", "| held-out source | nats per token | bits per byte | tokens |", "|---|---|---|---|", *rows]
    )


def _row(name: str, result: Mapping[str, Any]) -> str:
    per_byte = result.get("bits_per_byte")
    # A source of no bytes has none: null in JSON, not a number in memory.
    shown = "" if per_byte is None or math.isnan(per_byte) else f"{per_byte:.4f}"
    return f"| {name} | {result['nll_nats_per_token']:.4f} | {shown} | {result['tokens']:,} |"


def _adapter_text(adapter: str) -> str | None:
    """What the adapter's own card says, without its header."""
    card = Path(adapter) / CARD_NAME
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8")
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2]
    return f"## From the adapter's card\n\n{text.strip()}"

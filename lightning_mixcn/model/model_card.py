"""README of an exported model: what it was made of, and what the run measured."""

import json
from pathlib import Path
from typing import Any

from .identity import read_identity
from .model_source import ADAPTER_FOLDER, ModelSource

CARD_NAME = "README.md"
_REPORT = "validate.json"


def model_card(found: ModelSource, src: str, made: str, library: str) -> str:
    """Write the card. It has no date and no absolute path, so the same export gives the same bytes.

    Args:
        found: What was exported.
        src: What the person named; a run's ``validate.json`` is looked for there.
        made: How it was made, as sentences.
        library: ``transformers`` or ``peft``, for the hub's ``library_name``.
    """
    base = _public_name(found.base)
    header = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [mixtral, moe]"]
    if "/" in base:
        header.append(f"base_model: {base}")
    parts = ["\n".join([*header, "---"]), f"# {base}, adapted", made, _base_line(found, base)]
    parts += filter(None, [_figures(src), *(_adapter_text(adapter) for adapter in found.adapters)])
    return "\n\n".join(parts) + "\n"


def _public_name(path: str) -> str:
    """A hub id as it is, a folder without the path of this machine."""
    return Path(path).name if Path(path).expanduser().is_dir() else path


def _base_line(found: ModelSource, base: str) -> str:
    identities = [identity for adapter in found.adapters[:1] if (identity := read_identity(Path(adapter)))]
    content = f" (content hash `{identities[0]['sha256']}`)" if identities else ""
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
        rows = [_row(name, result) for name, result in sorted(report["sources"].items())]
        steps = report["steps_trained"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(reports[0])!r} is not what `mixcn validate` writes. Delete it or run it again"
        ) from error
    table = ["| held-out source | nats per token | bits per byte | tokens |", "|---|---|---|---|", *rows]
    return "\n".join([f"Measured on the run after {steps} steps, before export:", "", *table])


def _row(name: str, result: dict[str, Any]) -> str:
    per_byte = result.get("bits_per_byte")
    shown = "" if per_byte is None else f"{per_byte:.4f}"
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

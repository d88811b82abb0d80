"""Write the README of an adapter or an exported model: its origin, and the run's measurements."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.hub import public_name
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.identity import is_own_format, read_identity, stock_base
from lightning_mixcn.model.checkpoints.reading import model_config, stock_settings
from lightning_mixcn.model.find import ADAPTER_FOLDER, ModelSource

CARD_NAME = "README.md"
_REPORT = "validate.json"
_TRAINING = "## Training"
_HELD = {"nf4": "with the base in 4 bits (NF4)", "none": "with the base unquantised"}


@dataclass(frozen=True)
class Training:
    """Facts of a run for the card of its adapter.

    Args:
        base: Base of the run.
        steps: Optimizer steps of the adapter.
        quantization: ``nf4`` or ``none``.
        dtype: The compute dtype's name.
        chat_template: Name of the template of the answers in the run's configuration; ``None`` after pre-training.
        chat_is_portable: The adapter's folder has that template.
        end_ids: Tokens that end an answer.
        languages: Codes of the languages, where the user named them.
        identity: Result of `base_identity`; ``None`` where the base's content was not hashed.
        vocabulary_rows: Rows of embedding and head; ``None`` is as many as the base has.
    """

    base: Checkpoint
    steps: int
    quantization: str
    dtype: str
    chat_template: str | None = None
    chat_is_portable: bool = True
    end_ids: Sequence[int] = ()
    languages: Sequence[str] | None = None
    identity: Mapping[str, str] | None = None
    vocabulary_rows: int | None = None

    @property
    def shortcomings(self) -> list[str]:
        """List what other tools will miss in the adapter's folder, one line each."""
        lines = base_shortcomings(self.base)
        if self.chat_template is not None and not self.chat_is_portable:
            lines.append(
                f"the chat template {self.chat_template!r} has no equal in Jinja for this tokenizer, so none is "
                "written and servers refuse conversations. Give `data.init_args.template` a Jinja file"
            )
        return lines


def adapter_card(training: Training, measured: Mapping[str, Any]) -> str:
    """Write the card of an adapter that a run saves.

    Args:
        training: Facts of the run.
        measured: ``step`` and ``sources`` (by name: ``nll_nats_per_token``, ``bits_per_byte``, ``tokens``) of the run's
            last validation; empty if there was none.
    """
    named = stock_base(training.base) or training.base.name
    name, license_of = public_name(named), _license([named, training.base.name])
    resizing = resizing_note(training.vocabulary_rows, model_config(training.base).vocab_size)
    made = f"A LoRA adapter after {training.steps:,} optimizer steps, one pair of factors an expert.{resizing}"
    parts = [
        _header(training.base, named, "peft", training.languages, license_of),
        f"# {name}: LoRA adapter",
        made,
        _base_line(training.identity, name),
        *base_shortcomings(training.base),
        _license_line(license_of),
        _TRAINING,
        f"Trained for {training.steps:,} steps {_HELD[training.quantization]}, computed in {training.dtype}.",
        _chat_line(training),
    ]
    if measured:
        says = f"Measured after {measured['step']:,} steps, {_HELD[training.quantization]}:"
        parts.append(_table(measured["sources"], says))
    return "\n\n".join(filter(None, parts)) + "\n"


def model_card(
    found: ModelSource,
    src: str,
    made: str,
    library: str,
    *,
    onto: str | None,
    languages: Sequence[str] | None = None,
    instruct: str | None = None,
) -> str:
    """Write the card of an export. It has no date and no absolute path, so the same export gives the same bytes.

    Args:
        found: Exported model.
        src: Name that the user gave; a run's ``validate.json`` is looked for there.
        made: Sentences about how it was made.
        library: ``transformers`` or ``peft``, for the hub's ``library_name``.
        onto: ``original`` or ``dequantised`` weights that adapters were merged onto; ``None`` for an adapter.
        languages: Codes for the header; ``None`` takes those of the adapters' cards.
        instruct: Public name of the instruct model whose difference from the base was added.
    """
    named = stock_base(found.base) or found.base.name
    name, license_of = public_name(named), _license([named, found.base.name])
    title = f"{name}: LoRA adapter" if onto is None else f"{name}, adapted" if found.adapters or instruct else name
    folders = [adapter.folder for adapter in found.adapters]
    if languages is None:
        languages = _languages(folders)
    parts = [
        _header(found.base, named, library, languages, license_of),
        f"# {title}",
        made,
        _base_line(read_identity(folders[0]) if folders else None, name),
        *(base_shortcomings(found.base) if onto is None else []),
        _license_line(license_of),
        _template_line(instruct, is_base=onto is not None and not found.adapters),
        _figures(src, onto, instruct, is_scaled=bool(scaling_note(found))) if found.adapters else None,
        *map(_adapter_text, folders),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _template_line(instruct: str | None, *, is_base: bool) -> str | None:
    if instruct is not None:
        return (
            f"Chat template and generation config here are those of `{instruct}`, whose license counts as well. What "
            "an adapter's training below says of a template is about the adapter alone."
        )
    return "A chat template here is the base's." if is_base else None  # of adapters, their own cards say it


def public_title(found: ModelSource, *, changed: bool = False) -> str:
    """Return a short name for a merged model that is the same on every machine, e.g. ``Mixtral-8x7B-v0.1-adapted``.

    Args:
        found: The model.
        changed: It differs from its base even where it has no adapter.
    """
    named = stock_base(found.base) or found.base.name
    return public_name(named).rpartition("/")[2] + ("-adapted" if found.adapters or changed else "")


def resizing_note(rows: int | None, base_rows: int) -> str:
    """Say what a user of an adapter has to do first where it has more rows of embedding and head than the base.

    Args:
        rows: Rows that the adapter holds; ``None`` if it does not hold all of them.
        base_rows: Rows of the base.
    """
    if rows is None or rows <= base_rows:
        return ""
    return (
        f" Its tokenizer has more pieces than the base's: call `base.resize_token_embeddings({rows}, "
        "mean_resizing=False)` before PEFT loads it."
    )


def scaling_note(found: ModelSource) -> str:
    """Say by which factors an export scales its adapters (which it does alike), and nothing where it does not."""
    factors = found.adapters[0].layer_scale if found.adapters else {}
    if not factors:
        return ""
    by_layer = ", ".join(f"{factor:g} in layer {layer}" for layer, factor in factors.items())
    return f" What it changes is multiplied by layer: {by_layer} (arXiv 2606.00284)."


def _header(
    checkpoint: Checkpoint, base: str, library: str, languages: Sequence[str] | None, license_of: Mapping[str, Any]
) -> str:
    is_hub_id = "/" in base and not Path(base).is_absolute() and not Path(base).expanduser().is_dir()
    data = ModelCardData(
        base_model=base if is_hub_id else None,
        language=list(languages) if languages else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=[stock_settings(checkpoint.config)["model_type"], "moe"],
        **license_of,
    )
    return f"---\n{data.to_yaml()}\n---"


def _base_line(identity: Mapping[str, str] | None, base: str) -> str:
    digest = None if identity is None else identity.get("original_sha256", identity.get("sha256"))
    return f"Base: `{base}`{f' (content hash `{digest}`)' if digest else ''}."


def base_shortcomings(base: Checkpoint) -> list[str]:
    """Say what keeps other tools from the base of an adapter, as sentences; nothing, where they find it."""
    if not is_own_format(base.config):
        return []
    named, folder = stock_base(base), public_name(str(base.path))
    if named is None:
        return [
            f"The base {folder!r} is in 4 bits and does not record what it was made from, so the adapter names no "
            "base: set base_model_name_or_path in adapter_config.json to the unquantised model for other tools"
        ]
    if not Path(named).is_dir() and (Path(named).is_absolute() or "/" not in named):
        return [
            f"The unquantised base {public_name(named)!r}, which {folder!r} was made from, was not there when the "
            "adapter was written: set base_model_name_or_path in adapter_config.json to where it is for other tools"
        ]
    return []


def _license(bases: Sequence[str]) -> dict[str, str]:
    """Return the license fields of the first base on this machine whose own card names a license."""
    for base in bases:
        metadata = _metadata(Path(base).expanduser())
        # A list names no single license, and YAML reads other things than text, too.
        fields = ("license", "license_name", "license_link")
        named = {key: metadata[key] for key in fields if isinstance(metadata.get(key), str)}
        if "license" in named:
            return named
    return {}


def _metadata(folder: Path) -> dict[str, Any]:
    """Read the header of a folder's card; none where there is no card, or where its header cannot be read.

    The card is a stranger's, and describes only: a run does not end because of it.
    """
    card = folder / CARD_NAME
    try:
        return (metadata_load(card) or {}) if card.is_file() else {}
    except (yaml.YAMLError, ValueError):
        return {}


def _license_line(license_of: Mapping[str, str]) -> str:
    if not license_of:
        return "License: that of the base, which its files here do not state."
    return f"License: {license_of.get('license_name', license_of['license'])}, as the base's card says."


def _languages(adapters: Sequence[Path]) -> list[str]:
    """Return the languages that the adapters' cards name, each once."""
    named: list[str] = []
    for adapter in adapters:
        given = _metadata(adapter).get("language")
        listed = given if isinstance(given, list) else [given]
        named += [language for language in listed if isinstance(language, str)]
    return list(dict.fromkeys(named))


def _chat_line(training: Training) -> str:
    if training.chat_template is None:
        return "Trained on plain text: a chat template here is the base's, and was not trained on."
    ends = ", ".join(map(str, training.end_ids))
    if not training.chat_is_portable:
        return (
            f"Answers were laid out by {Path(training.chat_template).name!r}, which has no equal in Jinja: there is no "
            f"chat template here. Tokens that end an answer: {ends}."
        )
    return (
        f"Answers were laid out by the chat template in this folder ({Path(training.chat_template).name!r} in the "
        f"run's configuration). Tokens that end an answer: {ends}."
    )


def _figures(src: str, onto: str | None, instruct: str | None, *, is_scaled: bool) -> str | None:
    """Return a table of the likelihoods that `mixcn validate` wrote into the run's folder."""
    folder = Path(src).expanduser()
    runs = [folder, folder.parent] if folder.name == ADAPTER_FOLDER else [folder]
    reports = [run / _REPORT for run in runs if (run / _REPORT).is_file()]
    if not reports:
        return None
    try:
        report = json.loads(reports[0].read_text(encoding="utf-8"))
        held = _HELD.get(report.get("quantization"))
        says = f"Measured on the run after {report['steps_trained']} steps{f', {held}' if held else ''}, before export"
        if report.get("quantization") == "nf4" and onto == "original":
            says += "; the merged model differs by what the 4 bits round off"
        if is_scaled:
            says += "; layers were scaled after that"
        if instruct is not None:
            says += f"; the difference of `{instruct}` was added after that"
        return _table(report["sources"], f"{says}:")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
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


def _adapter_text(adapter: Path) -> str | None:
    """Return the part of an adapter's card about its training; of another tool's card, all of it but the header."""
    card = adapter / CARD_NAME
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    text = (text.partition("\n---\n")[2] if text.startswith("---\n") else text).strip()
    _, found, training = text.partition(f"{_TRAINING}\n")
    if found:
        return f"{_TRAINING}\n{training}"
    return f"## From the adapter's card\n\n{text}" if text else None

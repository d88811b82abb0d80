"""Sections on the training: its result, what was trained, on what, and the curves."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.written import in_units
from lightning_mixcn.model.checkpoints.identity import read_identity
from lightning_mixcn.model.find import ADAPTER_FOLDER
from lightning_mixcn.text import ConversationSource, PreferenceSource, Source, parse_sources
from lightning_mixcn.text.corpus.listings import list_files

from .blocks import Block, Note, Section, Table, as_text, charts, facts
from .charts import line_chart
from .run_record import HeldOut, RunRecord, Series, model_name

_BITS = "bits_per_byte"


class Comparison(NamedTuple):
    """Evaluations of a run.

    Args:
        before: Of the model that training began from, or the first one of training; ``None`` if there is none.
        after: The last one.
        others: Of other models, in folders of the run.
    """

    before: HeldOut | None
    after: HeldOut | None
    others: list[HeldOut]


def compared_evaluations(run: RunRecord) -> Comparison:
    """Find what is to be compared in a run. Raises: ValueError: a ``validate.json`` is damaged."""
    found, own = run.evaluations(), run.own_model()
    started = [each for each in found if each.step == 0 and each.model == own]
    curves = run.tagged("val/", f"/{_BITS}")
    steps = sorted({step for series in curves.values() for step in series})
    in_training = [
        HeldOut("", step, {name: {_BITS: series[step]} for name, series in curves.items() if step in series})
        for step in (steps[:1] + steps[-1:])
    ]
    ended = [each for each in found if not each.name and each.step >= (steps[-1] if steps else 1)]
    after = (ended + in_training[-1:])[:1]
    before = (started or (in_training[:1] if len(steps) > 1 else []))[:1]
    others = [each for each in found if each not in [*before, *after] and each.name]
    return Comparison(before[0] if before else None, after[0] if after else None, others)


def _result(run: RunRecord) -> Section | None:
    """Compare bits per byte of each source before and after."""
    before, after, others = found = compared_evaluations(run)
    shown = [each for each in (before, after, *others) if each is not None]
    if not shown:
        return None
    both = before is not None and after is not None
    head = ["held-out source", *(_heading(each, found) for each in shown)]
    rows = []
    for source in dict.fromkeys(name for each in shown for name in each.sources):
        values = [_bits(each, source) for each in shown]
        cells = [source, *(_number(value, ".4f") for value in values)]
        if both:
            cells.insert(3, _change(*values[:2]))
        sizes = (each.sources.get(source, {}).get("bytes") for each in shown)
        rows.append([*cells, next((f"{size:,}" for size in sizes if isinstance(size, int)), "–")])
    if both:
        head.insert(3, "change")
    blocks: list[Block] = [Table([*head, "bytes"], rows, note="Bits per byte of held-out text: less is better.")]
    if before is None or before.step > 0:
        config = run.root / "config.yaml"
        command = f"mixcn validate --config {config} --trainer.default_root_dir {run.root / 'before'}"
        blocks.append(Note(f"The model before training was not evaluated. It is by {command}, before this report."))
    return Section("Bits per byte by language", blocks)


def _change(first: float | None, last: float | None) -> str:
    return f"{last - first:+.4f} ({last / first - 1:+.1%})" if first and last is not None else "–"


def _bits(evaluation: HeldOut, source: str) -> float | None:
    value = evaluation.sources.get(source, {}).get(_BITS)
    return float(value) if isinstance(value, int | float) else None


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _heading(evaluation: HeldOut, found: Comparison) -> str:
    if evaluation is found.before and evaluation.step == 0:
        return "before training"
    if evaluation.step or evaluation.model is None:
        return f"after {evaluation.step:,} steps" + (f", {evaluation.name}/" if evaluation.name else "")
    base, quantization, adapter = evaluation.model
    how = {"nf4": "in 4 bits", "none": "unquantised"}.get(quantization, quantization)
    return f"{evaluation.name}/: " + ", ".join(filter(None, (base, how, adapter)))


def _setup(run: RunRecord) -> Section | None:
    """Say what was trained, and how."""
    module, trainer, data = (run.section(name) for name in ("model", "trainer", "data"))
    made, lora = run.json("facts.json") or {}, _arguments(module.get("lora"))
    counted = made.get("parameters")
    planned = trainer.get("max_steps")
    base = {
        "base": model_name(str(module["base"])) if module.get("base") else None,
        "content of the base (SHA-256)": _base_digest(run),
        "base in memory": {"nf4": "4 bits (NF4), every expert", "none": "unquantised"}.get(
            str(module.get("quantization")), module.get("quantization")
        ),
        "computed in": module.get("dtype"),
        "tokenizer": None if module.get("tokenizer") is None else model_name(str(module["tokenizer"])),
        "continued from the adapter": module.get("adapter") and model_name(str(module["adapter"])),
        "module": run.class_name("model"),
    }
    trained = {
        "LoRA": lora and _lora(lora),
        "LoRA on": lora.get("target_modules"),
        "embeddings and head trained": module.get("train_embeddings") or None,
        "parameters": counted and _counts(counted),
        "optimizer": _call(module.get("optimizer")),
        "schedule of the learning rate": _call(module.get("lr_scheduler")),
        "multipliers of the learning rate": module.get("learning_rates"),
        "activation checkpointing": module.get("activation_checkpointing"),
        "loss of preferences": module.get("loss"),
    }
    steps = f"{run.steps:,}" + (f" of {planned:,}" if isinstance(planned, int) and planned > 0 else "")
    batch = {
        "optimizer steps": steps,
        "tokens of a row": data.get("sequence_length"),
        "rows of a micro-batch on a rank": data.get("micro_batch_size"),
        "micro-batches of a step": trainer.get("accumulate_grad_batches"),
        "packing": data.get("packing"),
        "chat template": data.get("template"),
        "devices": " ".join(str(trainer[name]) for name in ("accelerator", "devices") if trainer.get(name)),
        "strategy": _call(trainer.get("strategy")),
        "time of training": _duration(sum(start.seconds for start in run.starts)),
        "begun": ", ".join(f"{start.began:%Y-%m-%d %H:%M} UTC" for start in run.starts[:1]),
        "resumed": ", ".join(f"after step {start.first_step - 1:,}" for start in run.starts[1:]),
    }
    return Section("What was trained", [facts(base | trained | batch)])


def _base_digest(run: RunRecord) -> str | None:
    identity = read_identity(run.root / ADAPTER_FOLDER)
    return None if identity is None else identity.get("original_sha256", identity["sha256"])


def _arguments(part: Any) -> Mapping[str, Any]:
    """Return the arguments of a class in a configuration, or of what is written without one."""
    if not isinstance(part, Mapping):
        return {}
    inner = part.get("init_args", part)
    return inner if isinstance(inner, Mapping) else {}


def _lora(lora: Mapping[str, Any]) -> str:
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    parts = [f"{name} {as_text(lora[key])}" for key, name in names.items() if lora.get(key) is not None]
    return ", ".join([*parts, *(["rsLoRA"] if lora.get("use_rslora") else [])])


def _counts(counted: Any) -> str:
    return ", ".join(f"{value:,} {name}" for name, value in counted.items()) if isinstance(counted, Mapping) else ""


def _call(part: Any) -> str | None:
    """Write a class of a configuration with the arguments that are set."""
    if not isinstance(part, Mapping):
        return None if part is None else str(part)
    given = {name: value for name, value in _arguments(part).items() if value not in (None, False)}
    name = str(part.get("class_path", "")).rpartition(".")[2]
    shown = {key: str(each).lower() if each is True else str(each) for key, each in given.items()}
    return f"{name}({', '.join(f'{key}={each}' for key, each in shown.items())})"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds else ""


_KINDS: dict[str, Any] = {
    "PretrainDataModule": Source,
    "InstructDataModule": ConversationSource,
    "PreferenceDataModule": PreferenceSource,
}


def _sources(run: RunRecord) -> Section | None:
    """List the sources: weights, tokens trained on, and files."""
    data = run.section("data")
    given = [each for each in data.get("sources") or [] if isinstance(each, Mapping)]
    tokens = {name: series[max(series)] for name, series in run.tagged("data/", "/tokens").items()}
    names = [str(each.get("name")) for each in given] or list(tokens)
    if not names:
        return None
    total, by_name = sum(tokens.values()), dict(zip(names, given, strict=False))
    rows = []
    for name in names:
        entry = by_name.get(name, {})
        share = f"{tokens[name] / total:.1%}" if total and name in tokens else "–"
        asked, epoch = run.last(f"data/{name}/token_share_asked"), run.last(f"data/{name}/epoch")
        files, size = _files(entry, run)
        rows.append(
            [
                name,
                as_text(entry.get("path", "–")),
                as_text(entry.get("weight", "–")),
                f"{tokens[name]:,.0f}" if name in tokens else "–",
                share,
                _number(asked, ".1%"),
                _number(epoch, ".3g"),
                files,
                size,
            ]
        )
    head = ["source", "path", "weight", "tokens trained on", "share", "share asked for", "epochs", "files", "bytes"]
    blocks: list[Block] = [Table(head, rows, texts=[1], note=_FILES)]
    seen = (run.json("facts.json") or {}).get("text_bytes_seen")
    more = {
        "tokens trained on": f"{total:,.0f}" if total else None,
        "bytes of text trained on": seen,
        "held-out text": [f"{each.get('name')}: {as_text(each.get('path'))}" for each in _listed(data, "val_sources")]
        or (f"{data['val_fraction']:.2%} of each source" if isinstance(data.get("val_fraction"), float) else None),
    }
    return Section("Data", [*blocks, facts(more)])


_FILES = "Files and their bytes are those that the paths lead to from where this report was written."


def _listed(data: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return [each for each in data.get(name) or [] if isinstance(each, Mapping)]


def _files(entry: Mapping[str, Any], run: RunRecord) -> tuple[str, str]:
    """Return number and size of a source's files; dashes where they are not here, or are no local files."""
    kind = _KINDS.get(run.class_name("data"))
    try:
        files = list_files(parse_sources([entry], "sources", kind)[0]) if kind and entry else []
        sizes = [file.path.stat().st_size for file in files if not isinstance(file.path, str)]
    except (UserError, OSError):
        return "–", "–"
    return (f"{len(sizes):,}", in_units(sum(sizes))) if sizes and len(sizes) == len(files) else ("–", "–")


def _curves(run: RunRecord) -> Section | None:
    """Draw loss, learning rate, throughput and likelihoods of held-out text."""
    before = compared_evaluations(run).before
    held_out = {name: dict(series) for name, series in run.tagged("val/", f"/{_BITS}").items()}
    for name, series in held_out.items():
        if before is not None and before.step == 0 and (value := _bits(before, name)) is not None:
            series[0] = value
    drawn = [
        line_chart("loss", _named(run, {"minimised": "train/loss", "nats per token": "train/nll_nats_per_token"})),
        line_chart("held-out text: bits per byte", held_out),
        line_chart("learning rate", run.tagged("lr-")),
        line_chart("throughput: tokens per second", _named(run, {"all ranks": "throughput/tokens_per_second"})),
        line_chart("norm of the gradient", _named(run, {"before clipping": "train/gradient_norm"})),
        line_chart("divergence from the base: nats per token", _named(run, {"": "train/kl_to_base_nats_per_token"})),
    ]
    blocks = charts(drawn)
    return Section("Curves", blocks) if blocks else None


def _preferences(run: RunRecord) -> Section | None:
    """Draw what training on pairs of answers does to them."""
    if "train/accuracy" not in run.scalars:
        return None
    rewards = {name: f"train/reward_{name}" for name in ("chosen", "rejected", "margin")}
    divergence = {side: f"train/kl_{side}_nats_per_token" for side in ("chosen", "rejected")}
    drawn = [
        line_chart("rewards", _named(run, rewards)),
        line_chart(
            "share of pairs whose chosen answer has the higher reward",
            {"training": run.scalars["train/accuracy"], **run.tagged("val/", "/accuracy")},
        ),
        line_chart("held-out pairs: margin of the rewards", run.tagged("val/", "/reward_margin")),
        line_chart("divergence from the reference: nats per token", _named(run, divergence)),
    ]
    return Section("Preferences", charts(drawn))


def _named(run: RunRecord, tags: Mapping[str, str]) -> dict[str, Series]:
    return {name: run.scalars[tag] for name, tag in tags.items() if tag in run.scalars}


TRAINING: Sequence[Any] = (_result, _setup, _sources, _curves, _preferences)

"""Sections on memory and speed, planned beside measured, and on what made the run: command, versions, configuration."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lightning_mixcn import __version__
from lightning_mixcn.cli.plan import RunPlan
from lightning_mixcn.cli.public_bases import PUBLIC_BASES
from lightning_mixcn.cli.run_folder import CONFIG
from lightning_mixcn.cli.trainer import run_trainer
from lightning_mixcn.errors import UserError

from .blocks import Block, Listing, Note, Section, Table, facts
from .run_record import RunRecord

_GIB = 2**30
# Arguments of the trainer that a plan depends on.
_PLANNED = ("accelerator", "strategy", "devices", "num_nodes", "max_steps", "accumulate_grad_batches")
# A plan makes the classes of a configuration, and the folder may be a stranger's. jsonargparse imports whatever looks
# like `package.name` in an argument that can be a class or a function, also in YAML inside a text, and reads files.
_KNOWN = ("lightning_mixcn.", "lightning.", "torch.", "peft.", "bitsandbytes.")
_IMPORTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")
# Arguments that are texts and nothing else: names of files, and one of PEFT's, `megatron.core` unless it is changed.
_PLAIN = {"base", "tokenizer", "adapter", "path", "megatron_core"}


def _planned(run: RunRecord) -> Section | None:
    """Compare memory and speed with the plan."""
    measured = _measured(run)
    plan, reason = _plan(run)
    if not measured and plan is None:
        return None
    planned = {} if plan is None else _of_plan(plan, run)
    names = list(dict.fromkeys([*measured, *planned]))
    rows = [[name, planned.get(name, "–"), measured.get(name, "–")] for name in names]
    blocks: list[Block] = [Table(["of a rank", "planned", "measured"], rows, texts=[1, 2])]
    if plan is None:
        blocks.append(Note(f"There is no plan beside it: {reason}"))
    else:
        words = (
            "The plan was made with this report, for the machine where it was written and the work that it had then."
        )
        if _RESIDENT in " ".join(measured.values()):
            words += " Resident memory has Python and its libraries in it, which the plan does not count."
        blocks.append(Note(words))
        blocks.append(Listing("The whole plan", plan.text()))
    return Section("Planned and measured", blocks)


def _of_plan(plan: RunPlan, run: RunRecord) -> dict[str, str]:
    found = {"memory at the fullest moment": f"{plan.memory.peak / 1e9:.2f} GB"}
    logged = run.last("throughput/peak_teraflops_per_second")
    if (speed := plan.speed(None if logged is None else logged * 1e12)) is not None:
        limit, expected = speed
        found["tokens per second"] = f"{expected:,.0f} expected, {limit:,.0f} at most"
        tokens = plan.run.batch.tokens * run.section("trainer").get("accumulate_grad_batches", 1)
        found["seconds of a step"] = f"{tokens / expected:.3g}"
    return found


def _measured(run: RunRecord) -> dict[str, str]:
    """Return what `ThroughputLogger` and `RunFacts` measured."""
    made, found = run.json("facts.json") or {}, dict[str, str]()
    for name, words in (("peak_allocated_gib", "allocated on the GPU"), ("host_resident_gib", _RESIDENT)):
        if series := run.scalars.get(f"throughput/{name}"):
            found["memory at the fullest moment"] = f"{max(series.values()) * _GIB / 1e9:.2f} GB {words}"
            break
    if isinstance(peak := made.get("peak_memory_bytes"), int):
        found["the same, at any moment of the run"] = f"{peak / 1e9:.2f} GB"
    medians = {
        "tokens per second": ("tokens_per_second_per_device", ",.1f"),
        "seconds of a step": ("seconds_per_step", ".3g"),
        "share of the device's peak rate": ("fraction_of_peak", ".1%"),
        "the same, with what is recomputed": ("fraction_of_peak_with_recompute", ".1%"),
        "seconds of a step that wait for data": ("seconds_data", ".3g"),
    }
    for name, (tag, form) in medians.items():
        if series := run.scalars.get(f"throughput/{tag}"):
            found[name] = f"{median(series.values()):{form}}"
    return found


_RESIDENT = "resident memory of the process"


def _plan(run: RunRecord) -> tuple[RunPlan | None, str]:
    """Plan the run; where that cannot be done here, say why."""
    if not run.config:
        return None, "the run has no configuration, as one from Python."
    settings: dict[str, Any] = {name: run.settings.get(name) for name in ("model", "data")}
    settings["seed_everything"] = False  # nothing is drawn
    trainer = run.section("trainer")
    settings["trainer"] = {name: trainer[name] for name in _PLANNED if trainer.get(name) is not None}
    if foreign := _foreign(settings):
        return None, f"the configuration names {foreign}, and a report runs no code of others."
    base = run.section("model").get("base")
    if not (isinstance(base, str) and (Path(base).expanduser().is_dir() or base in PUBLIC_BASES)):
        return None, "the base is not where this report was written."  # its hub would have to be asked
    with TemporaryDirectory() as folder:
        file = Path(folder, CONFIG)
        file.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
        try:
            return run_trainer(["fit", "--config", str(file), "--plan"]), ""
        except UserError as error:
            return None, str(error)


def _foreign(settings: Mapping[str, Any]) -> str | None:
    """Return a name in a configuration whose code may be somebody else's; ``None`` if there is none."""
    for part in ("model", "data"):
        if not isinstance(settings[part], Mapping):
            return f"{settings[part]!r} as its `{part}`"
    named = (name for text in _texts(settings) for name in _IMPORTED.findall(text))
    return next((name for name in named if not name.startswith(_KNOWN)), None)


def _texts(settings: Any) -> Iterator[str]:
    """Yield all texts of a configuration that could be more than texts."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            if name not in _PLAIN:
                yield from _texts(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _texts(value)
    elif isinstance(settings, str):
        yield settings


def _origin(run: RunRecord) -> Section:
    """Say by which commands, versions and machines the run was made."""
    rows = [
        [
            f"{start.began:%Y-%m-%d %H:%M} UTC",
            start.environment.get("command", "–"),
            start.environment.get("machine", "–"),
        ]
        for start in run.starts
    ]
    blocks: list[Block] = [Table(["begun", "command", "machine"], rows, texts=[1, 2])] if rows else []
    versions = dict(run.starts[-1].environment) if run.starts else {}
    versions = {name: value for name, value in versions.items() if name not in ("command", "machine")}
    header = run.config.partition("\n")[0].removeprefix("# ") if run.config.startswith("# ") else ""
    noted = {header.partition("==")[0]: header.partition("==")[2]} if "==" in header else {}
    blocks.append(facts({**(versions or noted), "report written by": f"lightning_mixcn {__version__}"}))
    if run.config:
        again = f"mixcn fit --config {CONFIG} --trainer.default_root_dir OUT"
        blocks.append(Note(f"The same again, with the configuration below as {CONFIG}: {again}"))
        blocks.append(
            Listing(
                f"The configuration, {CONFIG}", yaml.safe_dump(dict(run.settings), allow_unicode=True, sort_keys=False)
            )
        )
    return Section("Command and versions", blocks)


MEASURED: Sequence[Any] = (_planned, _origin)

"""Pages of ``mixcn help`` and of ``mixcn fit --help``: written from sources, so that nobody waits for torch."""

import shutil
import textwrap
from collections.abc import Iterable, Iterator

from lightning_mixcn.commands.catalogue import KINDS, class_path, first_sentence, members, nearest_class
from lightning_mixcn.commands.classes import (
    Argument,
    ClassSource,
    arguments_of,
    documentation,
    find_class,
    mentioned_classes,
)
from lightning_mixcn.commands.functions import function_parser
from lightning_mixcn.commands.table import COMMANDS, FUNCTIONS, NESTED, TRAINER_DEFAULTS
from lightning_mixcn.errors import UserError, nearest

CONFIG_OPTION = "YAML file, or name of one of this package's"
PLAN_OPTION = "print bytes by purpose, the largest micro-batch and expected tokens/s, load nothing, and exit"
CARD_OPTION = "with --plan: GPU to plan for in place of this machine's, such as h100-80gb or rtx-4090-24gb"
OVERWRITE_OPTION = "replace the run that is in trainer.default_root_dir, once the new one is loaded; other files stay"
# Callbacks that a run has without being asked.
ADDED_CALLBACKS = frozenset(
    {
        "AdapterCheckpoint",
        "DataMonitor",
        "EpochBudget",
        "EvaluationReport",
        "FitSummary",
        "LearningRateMonitor",
        "ParameterSummary",
        "PredictionWriter",
        "PreemptionCheckpoint",
        "StepCheckpoint",
        "StepProgressBar",
        "ThroughputLogger",
        "TrainabilityCheck",
    }
)

_TRAINER = "lightning.pytorch.Trainer"
_NOTES = {
    "callbacks": "* added to a run by itself",
    "strategies": "Names: `auto` (one process), `ddp`, `fsdp` or `fsdp2` (the 4-bit base sharded over all ranks), "
    "`hsdp` (sharded inside each node).",
    "optimizers": "A configuration has the full path, such as `torch.optim.AdamW`, since both packages have an AdamW.",
}
_CHECKPOINT = "checkpoint to load, or `last` for the run's newest"
_OPTIONS = {
    "fit": {
        "--ckpt_path PATH": "checkpoint to go on from, or `last` for the run's newest",
        "--plan": PLAN_OPTION,
        "--card NAME": CARD_OPTION,
        "--overwrite": OVERWRITE_OPTION,
    },
    "validate": {"--ckpt_path PATH": _CHECKPOINT, "--verbose BOOL": "print the results; default true"},
    "test": {"--ckpt_path PATH": _CHECKPOINT, "--verbose BOOL": "print the results; default true"},
    "predict": {
        "--ckpt_path PATH": _CHECKPOINT,
        "--return_predictions BOOL": "Lightning's; the file is written anyway",
    },
}
_OF_EVERY_RUN = {
    "-c, --config FILE": f"{CONFIG_OPTION}; later ones and options after it override it",
    "--print_config": "print the configuration of all files and options, and exit",
    "--seed_everything SEED": "seed of what has no seed of its own; default 0",
    "--weights_only BOOL": "load no more of a checkpoint than tensors and plain values, see torch.load",
}
# What most runs set of a class that is an argument itself.
_INNER = {
    "lora": ("peft.LoraConfig", ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")),
    "optimizer": ("torch.optim.AdamW", ("lr",)),
    "lr_scheduler": ("lightning_mixcn.modules.WarmupCosine", ("warmup_fraction", "final_fraction")),
}
_OF_THE_TRAINER = (
    *("max_steps", "max_time", "devices", "num_nodes", "strategy", "accumulate_grad_batches", "gradient_clip_val"),
    *("val_check_interval", "limit_val_batches", "callbacks", "logger", "default_root_dir", "fast_dev_run"),
)


def help(topic: list[str]) -> None:
    """Explain a command, or a class by its name; list callbacks, strategies, optimizers and more.

    Args:
        topic: A command, such as ``fit`` or ``vocab train``; ``trainer`` for the options of Lightning's Trainer; a
            class by its name, such as ``PretrainDataModule``, or by its full import path; or a list: ``modules``,
            ``data_modules``, ``callbacks``, ``strategies``, ``optimizers``, ``schedules``, ``loggers``.

    Raises:
        ValueError: there is no such topic.
    """
    print(page(" ".join(topic)))


def page(topic: str) -> str:
    """Return the page of a topic, see `help`."""
    command, _, nested = topic.partition(" ")
    if command in FUNCTIONS and (not nested or nested in NESTED.get(command, ())):
        text: str = function_parser(topic)[0].format_help()
        return text.rstrip()
    if topic in _OPTIONS:
        return run_page(topic)
    if topic in KINDS:
        return list_page(topic)
    if topic == "trainer":
        return trainer_page()
    return class_page(topic)


def run_page(command: str) -> str:
    """Return the help of `fit` and the like: this package's options first."""
    example = {"fit": "--model.lora.r 8 --trainer.max_steps 500"}.get(command, "--ckpt_path last")
    what = COMMANDS[command]
    lines = [
        f"usage: mixcn {command} --config FILE [--config OVERLAY …] [--OPTION VALUE …]",
        "",
        *_wrapped(
            f"{what[0].upper()}{what[1:]}. Any key of the YAML is an option, with or without its `init_args`.",
            "",
        ),
        "",
        f"  mixcn {command} --config pretrain_mixtral_8x7b --config trainer/gpu {example}",
        "",
        "Options",
        *_entries((_OPTIONS[command] | _OF_EVERY_RUN).items()),
    ]
    for part, name, other in (
        ("model", "PretrainModule", "modules"),
        ("data", "PretrainDataModule", "data_modules"),
    ):
        _, ours = next(members(other))
        others = ", ".join(each for each in ours if each != name)
        lines += ["", f"{part.title()}: `--{part} {name}`, or {others}"]
        lines += _options_of(part, _found(name))
    lines += ["", "Callbacks: `--trainer.callbacks+=ExpertLoadMonitor --trainer.callbacks.every_n_steps 100`"]
    lines += [*_rows(next(members("callbacks"))[1]), "  * added by itself"]
    lines += ["", "Used most of the trainer", *_wrapped(", ".join(f"--trainer.{name}" for name in _OF_THE_TRAINER))]
    return "\n".join([*lines, "", *_footer()])


def _footer() -> list[str]:
    return [
        "Lightning's Trainer: `mixcn help trainer`",
        "A class by its name: `mixcn help ExpertLoadMonitor`; lists of classes: `mixcn help callbacks`, "
        f"{', '.join(name for name in KINDS if name != 'callbacks')}",
    ]


def trainer_page() -> str:
    """Return the options of Lightning's Trainer, with this command's defaults."""
    arguments = arguments_of(_found(_TRAINER))
    lines = ["Lightning's Trainer: options of mixcn fit, validate, test and predict", ""]
    for argument in arguments:
        ours = TRAINER_DEFAULTS.get(argument.name)
        default = argument.default if ours is None else str(ours).lower()
        lines += _entry(f"--trainer.{argument.name}", Argument(argument.name, argument.kind, default, argument.about))
    return "\n".join(lines)


def list_page(kind: str) -> str:
    """Return a list of classes, a line each."""
    lists = list(members(kind))
    lines = [line for package, about in lists for line in (package, *_rows(about), "")]
    lines += _wrapped(_NOTES.get(kind, ""), "")
    return "\n".join([*lines, f"`mixcn help {next(iter(lists[0][1]))}` shows what one takes."])


def class_page(name: str) -> str:
    """Return what a class is and takes.

    Args:
        name: Its name, or full import path.

    Raises:
        ValueError: there is no such class.
    """
    path = class_path(name)
    if path is None:
        near = nearest(name, [*COMMANDS, *KINDS, "trainer"]) or nearest_class(name)
        meant = f" (did you mean {near!r}?)" if near else ""
        raise UserError(
            f"`mixcn help {name}`: there is no such command, list or class{meant}. Give a command of `mixcn --help`, "
            f"`trainer`, one of {', '.join(KINDS)}, or a class by its name or its full import path"
        )
    found = _found(path)
    told = documentation(found)
    about = "\n\n".join(filter(None, (told.short_description, told.long_description)))
    lines = [path, "", *(line for block in about.split("\n\n") for line in [*_wrapped(block, ""), ""])]
    arguments = arguments_of(found)
    lines += ["Arguments"] * bool(arguments)
    for argument in arguments:
        lines += _entry(argument.name, argument)
    known = [other for other in mentioned_classes(found) if _is_worth_a_page(found.module, other)]
    if known:
        lines += ["", f"See also: {', '.join(f'mixcn help {other}' for other in known)}"]
    return "\n".join(lines)


def _is_worth_a_page(module: str, name: str) -> bool:
    found = find_class(f"{module}.{name}")
    return found is not None and found.module.startswith(("lightning_mixcn", "peft"))


def _found(name: str) -> ClassSource:
    found = find_class(class_path(name) or name)
    assert found is not None
    return found


# ---- layout ----


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 100)


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    plain = " ".join(text.replace("``", "`").split())
    return textwrap.wrap(plain, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _entries(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Lay out options and what they do."""
    for name, about in entries:
        yield f"  {name}"
        yield from _wrapped(about, "      ")


def _entry(name: str, argument: Argument) -> list[str]:
    """Lay out an argument: its name, type and default, and what it is."""
    facts = [argument.kind, "required" if argument.default is None else f"default {argument.default}"]
    return list(_entries([(f"{name}  ({', '.join(filter(None, facts))})", argument.about)]))


def _rows(members: dict[str, str]) -> list[str]:
    """Lay out classes, a line each."""
    width = max(map(len, members)) + 2
    lines = []
    for name, about in members.items():
        shown = f"{name}{' *' if name in ADDED_CALLBACKS else ''}"
        room = max(_width() - width - 4, 20)
        lines.append(
            f"  {shown:<{width}}  {textwrap.shorten(about.replace('``', '`'), room, placeholder=' …')}".rstrip()
        )
    return lines


def _options_of(part: str, found: ClassSource) -> Iterator[str]:
    """Lay out a class's arguments as options, with what is set most of those that are classes themselves."""
    for argument in arguments_of(found):
        yield from _entry(f"--{part}.{argument.name}", argument)
        if argument.name in _INNER:
            path, names = _INNER[argument.name]
            for inner in arguments_of(_found(path)):
                if inner.name in names:
                    option = f"--{part}.{argument.name}.{inner.name}  ({inner.kind})"
                    yield from _entries([(option, first_sentence(inner.about))])
            yield from _wrapped(f"more: `mixcn help {path.rpartition('.')[2]}`", "      ")

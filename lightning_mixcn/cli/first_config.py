"""Write the first YAML of a run: settings of the package's configuration that fit base, machine and texts."""

import re
import textwrap
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from shlex import quote
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig

from lightning_mixcn.errors import ExistingFileError, MissingFileError, UserError, did_you_mean
from lightning_mixcn.files.atomic import new_file
from lightning_mixcn.metrics.device import CARDS
from lightning_mixcn.model.memory.budget import RESERVE
from lightning_mixcn.model.memory.counts import count_parameters
from lightning_mixcn.modules import FSDP2Strategy, InstructModule, PretrainModule
from lightning_mixcn.text import ConversationSource, Source, TextTokenizer, load_tokenizer, parse_sources

from .configs import carried_configs
from .plan import RunPlan, base_config
from .text_sample import FEW_DOCUMENTS, Sample, look_at_source

_CONFIGS = {"mixtral": "mixtral_8x7b", "olmoe": "olmoe_1b_7b", "qwen3_moe": "qwen3_30b_a3b"}
_MOST_ROWS, _LEAST_RANK, _SHORT_ROW = 8, 8, 1024
# Widths of a layer that one rank of LoRA is worth: of 8x7B's 4,096 columns the paper's 64.
_COLUMNS_A_RANK = 16
_LEAST_STEPS, _FEWEST_STEPS, _OFTEN = 200, 10, 250
_HELD_OUT_DOCUMENTS, _MOST_HELD_OUT = 20, 0.25
_REPLAY, _REPLAY_SHARE = "en", 0.1
_UNITS = {"line": "line", "blank-line": "block between blank lines"}
_COMMON_CARD, _COUNTS = "h100-80gb", (2, 4, 8)
_COUNT = re.compile(r"(?:(\d{1,3})x)?(.*)")
_EIGHT_BIT = "bitsandbytes.optim.AdamW8bit"
_WIDTH = 110


class Place(NamedTuple):
    """Devices to train on.

    Args:
        name: Name for a person.
        accelerator: Lightning's name, ``cpu`` or ``gpu``.
        card: Name in `CARDS` of a card like it; null for a device of this machine.
        bytes: The memory of each; null for a device of this machine.
        gpus: Number of GPUs, all of one machine.
    """

    name: str
    accelerator: str
    card: str | None = None
    bytes: int | None = None
    gpus: int = 1


@dataclass(frozen=True)
class Choice:
    """Settings that memory decides on.

    Args:
        rank: Rank of LoRA.
        train_embeddings: Embedding and head train.
        checkpointing: Activation checkpointing.
        eight_bit: The optimizer's moments are in 8 bits.
        length: Tokens of a row.
        strategy: Overlay of several GPUs: ``ddp`` holds the model on each, ``fsdp2`` shards it; null for one device.
        rows: Rows of a micro-batch.
    """

    rank: int
    train_embeddings: bool
    checkpointing: str
    eight_bit: bool
    length: int
    strategy: str | None = None
    rows: int = 1


def write_first_config(base: str, text: list[str], instruct: list[str], gpu: str | None, out: str) -> None:
    """Do what ``mixcn init`` does; see there for arguments and errors."""
    path = Path(out).expanduser()
    if path.exists():
        raise ExistingFileError(f"`out={out}` exists. Give another file, or remove it")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"`out={out}`: expected a file that ends in .yaml")
    if bool(text) == bool(instruct):
        raise UserError(
            "Give either `--text` or `--instruct`: a run trains on one of them. For both, run init for each, and start "
            "the second run with `--model.adapter` and the folder of the first"
        )
    place, config = place_of(gpu), base_config(base)
    tokenizer = _tokenizer_of(base)
    print(f"base: {base}, {config.model_type}, context {config.max_position_embeddings:,} tokens")
    samples = [
        look_at_source(source, f"{'text' if text else 'instruct'} {source.name}", tokenizer)
        for source in _sources(text, instruct)
    ]
    for sample in samples:
        print(f"{sample.source.name}: {sample.text()}")
        if sample.bad_records:
            print(f"  bad records in the sample, to be skipped: {sample.bad_records:,}. The first: {sample.bad_place}")
    settings = _packaged("instruct" if instruct else "pretrain", config)
    planner = _Planner(settings, base, config, place)
    choice, plan = planner.first_that_fits(partial(_rows_and_steps, settings["trainer"], samples, place.gpus))
    _settle(settings, base, place, choice, samples, _template(tokenizer) if instruct else None)
    with new_file(path) as unfinished:
        unfinished.write_text(_written(settings, planner, choice, samples), encoding="utf-8")
    print("\n".join(_summary(settings, planner, choice, plan)))
    print(f"{path} is written. Start the run:\n\nmixcn fit --config {quote(out)}")


def place_of(gpu: str | None) -> Place:
    """Return the devices that are meant by a name. Raises: ValueError."""
    name = (gpu or "").lower().replace(" ", "")
    if name == "cpu" or (gpu is None and not torch.cuda.is_available()):
        return Place("this machine's CPU", "cpu")
    if gpu is None:
        place = Place(torch.cuda.get_device_name(), "gpu")
        return _several(place, torch.cuda.device_count(), "this machine's ")
    count, name = _COUNT.fullmatch(name).groups()  # type: ignore[union-attr]  # it matches whatever comes
    if count is not None and int(count) < 1:
        raise UserError(f"`gpu={gpu}`: expected at least one GPU, such as 4x24gb")
    if name in CARDS:
        return _several(Place(name, "gpu", name, CARDS[name].bytes), int(count or 1))
    if size := re.fullmatch(r"(\d{1,4})gb", name):
        place = Place(f"GPU of {int(size[1])} GB", "gpu", next(iter(CARDS)), int(size[1]) * 10**9)
        return _several(place, int(count or 1), "a ")
    raise UserError(
        f"`gpu={gpu}` is not known{did_you_mean(name, CARDS)}. Give the GPU's memory, such as 24gb, or cpu, or one of "
        f"{', '.join(CARDS)}; of several, their number first, such as 4x24gb"
    )


def _several(place: Place, count: int, article: str = "") -> Place:
    name = f"{article}{place.name}" if count == 1 else f"{count} x {place.name}"
    return place._replace(name=name, gpus=count)


class _Planner:
    """Plans the choices for a base and a device, the most comfortable first."""

    def __init__(self, settings: dict[str, Any], base: str, config: Any, place: Place) -> None:
        self.settings, self.base, self.config, self.place = settings, base, config, place
        self.kind = InstructModule if settings["model"]["class_path"] == "InstructModule" else PretrainModule
        self.packaged_rank = settings["model"]["init_args"]["lora"]["r"]
        self.first = self._first()

    def first_that_fits(self, rows_and_steps: Callable[[int], tuple[int, int]]) -> tuple[Choice, RunPlan]:
        """Return the most comfortable choice that fits, with as many rows as fit and a step has, and its plan.

        Args:
            rows_and_steps: Gives the rows of a step, and the steps, for rows of so many tokens.
        """
        choices = list(self._choices())
        smallest = self.plan(choices[-1])
        if not self._fits(smallest):
            raise UserError(self._refusal(choices[-1], smallest))
        plans = ((choice, self.plan(choice)) for choice in choices[:-1])
        choice, plan = next((pair for pair in plans if self._fits(pair[1])), (choices[-1], smallest))
        most = min(_MOST_ROWS, plan.largest_rows(), rows_and_steps(choice.length)[0] // self.place.gpus)
        choice = replace(choice, rows=2 ** (most.bit_length() - 1))
        return choice, self.plan(choice)

    def plan(self, choice: Choice) -> RunPlan:
        """Plan a run on one device."""
        chosen = deepcopy(self.settings["model"]["init_args"])
        _set_model(chosen, choice)
        optimizer = chosen["optimizer"]
        module, _, name = optimizer["class_path"].rpartition(".")
        model = self.kind(
            self.base,
            lora=LoraConfig(**chosen["lora"]),
            dtype=chosen["dtype"],
            train_embeddings=choice.train_embeddings,
            activation_checkpointing=choice.checkpointing,  # type: ignore[arg-type]  # one of its names
            optimizer=partial(getattr(import_module(module), name), **optimizer["init_args"]),
        )
        data = SimpleNamespace(micro_batch_size=choice.rows, sequence_length=choice.length, packing="documents")
        trainer = SimpleNamespace(
            accelerator=self.place.accelerator,
            devices=self.place.gpus,
            num_nodes=1,
            strategy="auto" if choice.strategy is None else _strategy(choice.strategy),
            accumulate_grad_batches=2,
            max_steps=1,
        )
        plan = RunPlan(trainer, model, data, self.place.card)
        plan.usable = self.place.bytes or plan.usable
        return plan

    def _first(self) -> Choice:
        model, data = self.settings["model"]["init_args"], self.settings["data"]["init_args"]
        most = max(1, self.config.hidden_size // _COLUMNS_A_RANK)
        return Choice(
            min(model["lora"]["r"], 2 ** (most.bit_length() - 1)),
            model.get("train_embeddings", False),
            "selective",
            model["optimizer"]["class_path"] == _EIGHT_BIT and self.place.accelerator == "gpu",
            min(data["sequence_length"], self.config.max_position_embeddings),
            None if self.place.gpus == 1 else "ddp",
        )

    def _choices(self) -> Iterator[Choice]:
        choice = self.first
        yield choice
        smaller: list[dict[str, Any]] = [] if self.place.gpus == 1 else [{"strategy": "fsdp2"}]
        smaller += [{"checkpointing": "full"}, {"train_embeddings": False}]
        if self.place.accelerator == "gpu":
            smaller.append({"eight_bit": True})
        rank = choice.rank
        while rank > _LEAST_RANK:
            rank //= 2
            smaller.append({"rank": rank})
        smaller.append({"length": min(choice.length, _SHORT_ROW)})
        for change in smaller:
            if (changed := replace(choice, **change)) != choice:
                choice = changed
                yield choice

    @staticmethod
    def _fits(plan: RunPlan) -> bool:
        assert plan.usable is not None
        return plan.memory.peak <= (1 - RESERVE) * plan.usable

    def _refusal(self, choice: Choice, plan: RunPlan) -> str:
        assert plan.usable is not None
        peak = plan.memory.peak
        share = f", shared by {self.place.gpus} GPUs," if self.place.gpus > 1 else ""
        return (
            f"`base={self.base}` cannot be trained on {self.place.name}: even with rank {choice.rank}, rows of "
            f"{choice.length:,} tokens and full activation checkpointing a run{share} needs {peak / 1e9:.1f} GB"
            f"{' on each' if share else ''}, and {(1 - RESERVE) * plan.usable / 1e9:.1f} GB are there ({RESERVE:.0%} "
            f"stay in reserve). {self._what_would_do(choice)}, or take a smaller base"
        )

    def _what_would_do(self, choice: Choice) -> str:
        """Name the smallest card that would hold the run, or the fewest of the largest that share it."""
        one = replace(choice, strategy=None)
        peak = _Planner(self.settings, self.base, self.config, place_of("80gb")).plan(one).memory.peak
        larger = sorted((card.bytes, name) for name, card in CARDS.items() if (1 - RESERVE) * card.bytes >= peak)
        if larger:
            return f"`--gpu {larger[0][1]}` is the smallest card that would do"
        shared = replace(choice, strategy="fsdp2")
        for count in _COUNTS:
            place = place_of(f"{count}x{_COMMON_CARD}")
            planner = _Planner(self.settings, self.base, self.config, place)
            if self._fits(planner.plan(shared)):
                return f"`--gpu {count}x{_COMMON_CARD}` would do"
        return "No machine of eight GPUs would do: see `mixcn configs trainer/hsdp` for several"


def _sources(text: list[str], instruct: list[str]) -> tuple[Source, ...] | tuple[ConversationSource, ...]:
    entries = []
    for entry in text or instruct:
        name, equals, path = entry.partition("=")
        if not equals and instruct:
            name, path = "chat", entry
        if not name or not path or "/" in name:
            argument = "text" if text else "instruct"
            raise UserError(f"`{argument}={entry}`: expected NAME=PATH, such as zh=data/zh/*.jsonl")
        entries.append({"name": name, "path": path})
    return parse_sources(entries, "text", Source) if text else parse_sources(entries, "instruct", ConversationSource)


def _tokenizer_of(base: str) -> TextTokenizer | None:
    """Return the tokenizer of a folder; null where it has only the model's configuration, or is on a hub."""
    if not Path(base).expanduser().is_dir():
        return None
    try:
        return load_tokenizer(Path(base).expanduser())
    except MissingFileError:
        return None


def _strategy(overlay: str) -> DDPStrategy | FSDP2Strategy:
    """Return the strategy of a packaged overlay."""
    settings = _overlay(overlay)["init_args"]
    return DDPStrategy(**settings) if overlay == "ddp" else FSDP2Strategy(**settings)


def _overlay(name: str) -> dict[str, Any]:
    text = carried_configs()[f"trainer/{name}"].read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load(text)["trainer"]["strategy"]
    return settings


def _template(tokenizer: TextTokenizer | None) -> str:
    has_own = tokenizer is not None and tokenizer.hf.chat_template
    return "tokenizer" if has_own else "mixtral"


def _packaged(task: str, config: Any) -> dict[str, Any]:
    """Return the package's configuration of a task and the base's family, without what is of its own base."""
    path = carried_configs()[f"{task}_{_CONFIGS[config.model_type]}"]
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if task == "instruct":
        for name in ("adapter", "tokenizer", "train_embeddings"):
            settings["model"]["init_args"].pop(name, None)
    return settings


def _set_model(model: dict[str, Any], choice: Choice) -> None:
    """Write a choice into the arguments of the module; alpha keeps its ratio to the rank."""
    lora, optimizer = model["lora"], model["optimizer"]
    lora["lora_alpha"] = lora["lora_alpha"] * choice.rank // lora["r"]
    lora["r"] = choice.rank
    if choice.train_embeddings:
        model["train_embeddings"] = True
    else:
        model.pop("train_embeddings", None)
    model["activation_checkpointing"] = choice.checkpointing
    if choice.eight_bit:
        optimizer["class_path"] = _EIGHT_BIT
        optimizer["init_args"].pop("fused", None)
    elif optimizer["class_path"] == _EIGHT_BIT:
        optimizer["class_path"] = "torch.optim.AdamW"
        optimizer["init_args"]["fused"] = True


def _settle(
    settings: dict[str, Any], base: str, place: Place, choice: Choice, samples: list[Sample], template: str | None
) -> None:
    """Write what was chosen and found into the settings."""
    model, data, trainer = settings["model"]["init_args"], settings["data"]["init_args"], settings["trainer"]
    model["base"] = base
    _set_model(model, choice)
    weights = _weights([sample.source.name for sample in samples])
    data["sources"] = []
    for sample, weight in zip(samples, weights, strict=True):
        source = {"name": sample.source.name, "path": sample.source.path, "weight": weight}
        if isinstance(sample.source, Source) and sample.source.text_key != "text":
            source["text_key"] = sample.source.text_key
        if isinstance(sample.source, Source) and sample.source.document_unit != "file":
            source["document_unit"] = sample.source.document_unit
        data["sources"].append(source)
    data |= {"sequence_length": choice.length, "micro_batch_size": choice.rows}
    if template is not None:
        data["template"] = template
    if any(sample.bad_records for sample in samples):
        data["on_bad_record"] = "skip"
    counts = [sample.all_documents for sample in samples if sample.all_documents is not None]
    if any(sample.is_small for sample in samples):
        data["val_fraction"] = 0.0
    elif counts:
        wanted = _HELD_OUT_DOCUMENTS / min(counts)
        data["val_fraction"] = max(data["val_fraction"], round(min(_MOST_HELD_OUT, wanted), 3))
    rows, steps = _rows_and_steps(trainer, samples, place.gpus, choice.length)
    data["num_streams"] = min(data["num_streams"], max(rows, 8))
    often = max(1, min(_OFTEN, steps // 4))
    micro_batches = rows // (choice.rows * place.gpus)
    trainer["accumulate_grad_batches"] = micro_batches
    trainer["max_steps"], trainer["val_check_interval"] = steps, often * micro_batches
    if not data["val_fraction"]:
        del trainer["val_check_interval"]
        trainer["limit_val_batches"] = 0
    for callback in trainer["callbacks"]:
        callback["init_args"]["every_n_steps"] = often
        if "prompts" in callback["init_args"]:
            callback["init_args"]["prompts"] = [sample.prompt for sample in samples if sample.prompt]
    devices = {"accelerator": place.accelerator, "devices": place.gpus}
    if choice.strategy is not None:
        devices["strategy"] = _overlay(choice.strategy)
    settings["trainer"] = devices | trainer


def _weights(names: list[str]) -> list[float]:
    """Share the weight equally, but for a tenth of English beside others."""
    if _REPLAY not in names or len(names) == 1:
        return [round(1 / len(names), 3)] * len(names)
    other = round((1 - _REPLAY_SHARE) / (len(names) - 1), 3)
    return [_REPLAY_SHARE if name == _REPLAY else other for name in names]


def _rows_and_steps(trainer: dict[str, Any], samples: list[Sample], ranks: int, length: int) -> tuple[int, int]:
    """Return rows of a step and steps: those of the package, or of little text one pass in smaller steps.

    Each rank has a power of two of the rows.
    """
    steps, of_rank = trainer["max_steps"], max(1, trainer["accumulate_grad_batches"] // ranks)
    of_rank = 2 ** (of_rank.bit_length() - 1)
    tokens = [sample.all_tokens for sample in samples if sample.all_tokens is not None]
    if len(tokens) < len(samples):
        return of_rank * ranks, steps
    in_text = sum(tokens) / length
    while of_rank > 1 and in_text / (of_rank * ranks) < _LEAST_STEPS:
        of_rank //= 2
    return of_rank * ranks, max(_FEWEST_STEPS, min(steps, round(in_text / (of_rank * ranks))))


def _written(settings: dict[str, Any], planner: _Planner, choice: Choice, samples: list[Sample]) -> str:
    """Return the YAML with a comment before each setting that was chosen."""
    comments = _comments(settings, planner, choice, samples)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, default_flow_style=None, width=_WIDTH)
    lines = [
        f"# Written by `mixcn init` for {planner.place.name}. All settings that are not here have their defaults, see",
        f"# `mixcn help {settings['model']['class_path']}` and `mixcn help {settings['data']['class_path']}`.",
    ]
    for line in text.splitlines():
        found = re.match(r"( *)(\w+):", line)
        if found is not None and (comment := comments.pop(found[2], None)) is not None:
            lines += [f"{found[1]}# {part}" for part in textwrap.wrap(comment, _WIDTH - len(found[1]))]
        lines.append(line)
    return "\n".join(lines) + "\n"


def _comments(settings: dict[str, Any], planner: _Planner, choice: Choice, samples: list[Sample]) -> dict[str, str]:
    trainer, data = settings["trainer"], settings["data"]["init_args"]
    first, packaged_rank = planner.first, planner.packaged_rank
    rows, often = (
        trainer["accumulate_grad_batches"] * choice.rows * trainer["devices"],
        trainer["callbacks"][0]["init_args"]["every_n_steps"],
    )
    on_ranks = ". With more ranks divide this by their number."
    if trainer["devices"] > 1:
        on_ranks = f" on {trainer['devices']} ranks. With more or fewer change this, so that a step keeps its rows."
    lora, names = "Attention, router and experts train.", [sample.source.name for sample in samples]
    if choice.rank < packaged_rank:
        does_not_fit = choice.rank < first.rank
        lora += f" Rank {first.rank} would not fit." if does_not_fit else f" Rank {packaged_rank} is for wider models."
    units = {getattr(sample.source, "document_unit", "file") for sample in samples} - {"file"}
    divided = "".join(f" Of few text files each {_UNITS[unit]} is a document." for unit in sorted(units))
    replay = " A tenth of English against forgetting." if _REPLAY in names and len(names) > 1 else ""
    means = ", ".join(f"{sample.tokens_a_document:,.0f} ({sample.source.name})" for sample in samples)
    own_template = data.get("template") == "tokenizer"
    return {
        "quantization": "The base is frozen and held in 4 bits, its experts too.",
        "lora": lora,
        "train_embeddings": "Embedding and head train as well, since there is room.",
        "activation_checkpointing": "What fits with the fewest activations computed again: `selective` keeps the "
        "experts' products, `full` keeps a layer's input only.",
        "strategy": "Every GPU holds the model: the least traffic."
        if choice.strategy == "ddp"
        else "The GPUs share one copy of the model, since it does not fit into each with these settings.",
        "optimizer": "Moments in 8 bits, since those in 32 bits would not fit."
        if choice.eight_bit and not first.eight_bit
        else "The learning rate is the first thing to try other values of: half and twice as much.",
        "sources": f"Weights are shares of the training tokens.{replay}{divided}",
        "template": "The chat template of the base's tokenizer."
        if own_template
        else "Mixtral's chat template, since the base's tokenizer has none of its own.",
        "sequence_length": f"Tokens of a row; the base's context is {planner.config.max_position_embeddings:,}. Mean "
        f"tokens of a document, in the sample: {means}.",
        "micro_batch_size": "Rows that go through the model at once: as many as fit and a step has, eight at most.",
        "val_fraction": "Share of the documents that are held out, by a hash of their text, for validation."
        if data["val_fraction"]
        else f"A source has fewer than {FEW_DOCUMENTS} documents, too few to hold some out: give `val_sources`, "
        "and remove `limit_val_batches`.",
        "on_bad_record": "The sample has records that are refused; their number is in `data/bad_records`.",
        "accumulate_grad_batches": f"A step is {rows} row{'s' * (rows > 1)}, at most {rows * choice.length:,} "
        f"tokens{on_ranks}",
        "max_steps": _about_steps(trainer["max_steps"], rows * choice.length, samples),
        "val_check_interval": f"In micro-batches, not steps: every {often} step{'s' * (often > 1)}.",
    }


def _about_steps(steps: int, tokens_a_step: int, samples: list[Sample]) -> str:
    tokens = [sample.all_tokens for sample in samples]
    if None in tokens:
        return "Set it to the tokens that you want to train on, divided by those of a step."
    passes = steps * tokens_a_step / max(1, sum(filter(None, tokens)))
    return f"About {passes:.1f} times the tokens that all sources have together, as estimated from a sample."


def _summary(settings: dict[str, Any], planner: _Planner, choice: Choice, plan: RunPlan) -> list[str]:
    assert plan.usable is not None
    counts, trainer = count_parameters(plan.model), settings["trainer"]
    optimizer = settings["model"]["init_args"]["optimizer"]["class_path"].rpartition(".")[2]
    embeddings = ", embeddings and head" if choice.train_embeddings else ""
    on_each = f" on each of {planner.place.gpus} GPUs ({choice.strategy})" if choice.strategy else ""
    return [
        f"plan: {planner.place.name}, {plan.memory.peak / 1e9:.2f} GB of {(1 - RESERVE) * plan.usable / 1e9:.2f} GB"
        f"{' on each' * (planner.place.gpus > 1)} ({RESERVE:.0%} more stay in reserve)",
        f"  model: {counts['total'] / 1e9:.3g} billion parameters, of which {counts['trainable']:,} train (rank "
        f"{choice.rank}{embeddings}); {optimizer}; activation checkpointing: {choice.checkpointing}",
        f"  steps: {trainer['max_steps']:,} of {trainer['accumulate_grad_batches']} x {choice.rows} rows of "
        f"{choice.length:,} tokens{on_each}",
    ]

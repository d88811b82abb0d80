"""``mixcn fit … --plan``: what a run will need, from its configuration, before anything is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from transformers import PreTrainedConfig

from lightning_mixcn.data import StreamDataModule
from lightning_mixcn.errors import MissingFileError, UserError, did_you_mean
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.metrics.device import CARDS, PeakRate, copy_rate, peak_rate, stated_peak
from lightning_mixcn.model import build_moe
from lightning_mixcn.model.architectures import architecture_of
from lightning_mixcn.model.checkpoints.folder import read_config
from lightning_mixcn.model.checkpoints.reading import config_of, stock_settings
from lightning_mixcn.model.lora.adapter_file import AdapterFile
from lightning_mixcn.model.memory.budget import RESERVE, fitting_modes, usable_bytes
from lightning_mixcn.model.memory.checkpointing import layer_modes
from lightning_mixcn.model.memory.counts import decoding_bytes
from lightning_mixcn.model.memory.flops import count_training_flops
from lightning_mixcn.model.memory.plan import MemoryPlan, Run, plan_memory
from lightning_mixcn.modules import CausalLMModule
from lightning_mixcn.modules.memory import micro_batch, planned_run, sharing_of
from lightning_mixcn.text import load_tokenizer

from .public_bases import PUBLIC_BASES

# Of the products' rate: what the best public figure for this model reaches (an A100, attention-only LoRA).
EXPECTED_SHARE = 0.6


@dataclass(frozen=True)
class Ranks:
    """Where a run takes place, from ``trainer`` in its configuration; nothing is connected.

    Args:
        device_type: ``cuda`` or ``cpu``.
        of_node: Ranks on each machine.
        nodes: Machines.
    """

    device_type: str
    of_node: int
    nodes: int

    @classmethod
    def of(cls, settings: Any, card: str | None = None) -> "Ranks":
        """Read the settings as Lightning does; where there is no GPU, or for a card, ``devices: auto`` is one."""
        if card is not None:
            auto = settings.devices in ("auto", -1, "-1")
            return cls("cuda", 1 if auto else _count(settings.devices, "cuda"), int(settings.num_nodes))
        given, there = str(settings.accelerator), torch.cuda.is_available()
        device_type = "cuda" if given in ("gpu", "cuda") or (given == "auto" and there) else "cpu"
        return cls(device_type, _count(settings.devices, device_type), int(settings.num_nodes))

    @property
    def device(self) -> torch.device | None:
        """One like those of the run, if this machine has it."""
        return None if self.device_type == "cuda" and not torch.cuda.is_available() else torch.device(self.device_type)


class RunPlan:
    """A planned run.

    Args:
        settings: The configuration's ``trainer``, its classes made.
        module: The LightningModule; its model is not.
        data: The LightningDataModule.
        card: Name in `CARDS` of the GPU to plan for; null is what this machine has.

    Raises:
        ValueError: there is no such card, what the plan needs is not known, or `activation_memory` is too small.
    """

    def __init__(self, settings: Any, module: CausalLMModule, data: Any, card: str | None = None) -> None:
        if card is not None and card not in CARDS:
            raise UserError(f"`--card {card}` is not known{did_you_mean(card, CARDS)}. Give one of {', '.join(CARDS)}")
        self.ranks, self.module, self.card = Ranks.of(settings, card), module, card
        self.device = self.ranks.device
        self.model = meta_model_of(module)
        sharing = sharing_of(settings.strategy, self.ranks.of_node * self.ranks.nodes, self.ranks.of_node)
        accumulates, kind = settings.accumulate_grad_batches > 1, self.ranks.device_type
        run = planned_run(self.model, micro_batch(data), [], kind, accumulates, sharing, module.make_optimizer, module)
        self.usable = self._usable()
        self.run = replace(run, modes=self._modes(run))
        self.memory = plan_memory(self.model, self.run)
        rows_a_step = micro_batch(data).rows * self.ranks.of_node * self.ranks.nodes * settings.accumulate_grad_batches
        is_stream = isinstance(data, StreamDataModule)
        self.progress_rows = data.rows_of_progress(settings.max_steps or -1, rows_a_step) if is_stream else None

    def _usable(self) -> int | None:
        if self.card is not None:
            return CARDS[self.card].bytes
        return None if self.device is None else usable_bytes(self.device, self.ranks.of_node)

    def _modes(self, run: Run) -> list[str]:
        budget, layers = self.module.activation_memory, self.model.config.num_hidden_layers
        if budget is None:
            return layer_modes(self.module.activation_checkpointing, layers)
        if budget == "auto" and self.usable is None:
            raise UserError(
                "`activation_memory: auto` cannot be planned here: there is no GPU. Name one, such as `--card "
                "h100-80gb`, or give bytes for the plan"
            )
        return fitting_modes(self.model, run, budget, self.usable or 0)

    def largest_rows(self) -> int:
        """Return the most rows of a micro-batch that fit into the device, less the reserve; 0 if one does not."""
        assert self.usable is not None
        available = (1 - RESERVE) * self.usable
        # With a budget, layers are computed again until the micro-batch fits.
        modes = self.run.modes
        if self.module.activation_memory is not None:
            modes = [*["full"] * (len(modes) - 1), "selective"]

        def fits(rows: int) -> bool:
            run = replace(self.run, batch=self.run.batch._replace(rows=rows), modes=modes)
            return plan_memory(self.model, run).peak <= available

        if not fits(1):
            return 0
        most, too_many = 1, 2
        while fits(too_many):
            most, too_many = too_many, 2 * too_many
        while too_many - most > 1:
            middle = (most + too_many) // 2
            most, too_many = (middle, too_many) if fits(middle) else (most, middle)
        return most

    def text(self) -> str:
        """Return the plan as it is printed."""
        batch, modes = self.run.batch, self.run.modes
        counts = ", ".join(f"{mode} in {modes.count(mode)}" for mode in dict.fromkeys(modes))
        ranks, place = self.ranks.of_node * self.ranks.nodes, self.card or self.ranks.device_type
        lines = [
            f"One of {ranks} rank{'s' * (ranks > 1)} on {place}, micro-batches of {batch.rows} x {batch.length:,} "
            f"tokens, activations: {counts} layers",
            "",
            *_table(self.memory, type(self.module.make_optimizer([nn.Parameter(torch.zeros(1))])).__name__),
            "",
            f"The fullest moment of a step is the {self.memory.fullest.name}.",
        ]
        if self.progress_rows is not None:
            lines.append(f"Weights of sources by progress are fractions of {self.progress_rows:,} rows.")
        if self.usable is None:
            unknown = "There is no GPU here: what it holds, and how fast it is, is not known."
            return "\n".join([*lines, f"{unknown} `--card` plans for one of {', '.join(CARDS)}."])
        return "\n".join([*lines, self._fit(), *self._speed(*self._rates())])

    def _fit(self) -> str:
        assert self.usable is not None
        left = (1 - RESERVE) * self.usable - self.memory.peak
        rows = self.largest_rows()
        return (
            f"A rank can have {self.usable / 1e9:.2f} GB, of which {RESERVE:.0%} stay in reserve: the run "
            f"{'fits' if left >= 0 else 'does NOT fit'} ({left / 1e9:+.2f} GB). The largest micro-batch is {rows} rows "
            f"of {self.run.batch.length:,} tokens."
        )

    def _rates(self) -> tuple[PeakRate | None, float, str]:
        """Return the rates of products and of memory, and where the latter is from; None for products not known."""
        dtype = getattr(torch, self.module.dtype_name)
        if self.card is not None:
            card = CARDS[self.card]
            stated = None if dtype == torch.float32 else stated_peak(card.name)
            return (None if stated is None else PeakRate(stated, False)), card.bytes_per_second, "stated by its maker"
        assert self.device is not None
        return peak_rate(self.device, dtype), copy_rate(self.device), "measured"

    def speed(self, flops_per_second: float | None = None) -> tuple[float, float] | None:
        """Return tokens a second of a rank, documents filling their rows: the limit, and what is expected.

        Args:
            flops_per_second: Peak rate of products in a run that is over; null takes that of the device now.

        Returns:
            ``None`` where the device, or its rate in this type, is not known.
        """
        if self.usable is None:
            return None
        peak, rate, _ = self._rates()
        known = peak if flops_per_second is None else PeakRate(flops_per_second, True)
        return None if known is None else self._tokens_per_second(known, rate)

    def _work(self) -> tuple[float, float]:
        """Return a micro-batch's FLOP, and the bytes that are moved to decode weights."""
        batch = self.run.batch
        flops = count_training_flops(self.model, self.run.modes)
        total = flops.of(batch.tokens, batch.rows * batch.length * (batch.length + 1) // 2).total
        return total, decoding_bytes(self.model, self.run.modes)

    def _tokens_per_second(self, peak: PeakRate, rate: float) -> tuple[float, float]:
        total, copied = self._work()
        limit, expected = (
            self.run.batch.tokens / (total / peak.flops_per_second / share + copied / rate)
            for share in (1.0, EXPECTED_SHARE)
        )
        return limit, expected

    def _speed(self, peak: PeakRate | None, rate: float, copies: str) -> list[str]:
        """Say how long products and decoding take, and what tokens a second follow."""
        if peak is None:
            return ["How fast it is in float32 is not known."]
        total, copied = self._work()
        products, decoding = total / peak.flops_per_second, copied / rate
        limit, expected = self._tokens_per_second(peak, rate)
        measured = "measured" if peak.measured else "stated by its maker"
        return [
            f"A micro-batch takes {total / 1e12:.2f} TFLOP, {products:.3f} s at {peak.flops_per_second / 1e12:.2f} "
            f"TFLOP/s ({measured}), and moves {copied / 1e9:.2f} GB to decode weights, {decoding:.3f} s at "
            f"{rate / 1e9:.1f} GB/s ({copies}).",
            f"The limit is {limit:,.0f} tokens/s on a rank; {expected:,.0f} are expected, with products at "
            f"{EXPECTED_SHARE:.0%} of that rate. Traffic between ranks is not counted.",
        ]


def meta_model_of(module: CausalLMModule) -> Any:
    """Return the module's model without memory, from the base's and the tokenizer's configuration alone.

    Raises:
        FileNotFoundError: there is no such base.
        ValueError: its family is not supported, or an option does not fit.
    """
    config = base_config(module.base)
    if module.tokenizer_path != module.base:
        config.vocab_size = max(config.vocab_size, load_tokenizer(module.tokenizer_path).vocab_size)
    lora = module.lora
    if lora is None and module.adapter_path is not None:
        stored = AdapterFile(module.adapter_path, architecture_of(config))
        stored = stored.on_rounded_base() if module.quantization == "nf4" else stored
        lora = stored.lora_config(config.num_hidden_layers)
    return build_moe(
        config,
        quantization=module.quantization,
        lora=lora,
        dtype=module.dtype_name,
        device="meta",
        train_embeddings=module.train_embeddings,
        train_only=module.train_only,
    )


def base_config(base: str) -> PreTrainedConfig:
    """Read a base's configuration alone: from its folder, from `PUBLIC_BASES`, or from a hub. Raises: ValueError."""
    folder = Path(base).expanduser()
    if folder.exists() or base not in PUBLIC_BASES:
        settings = stock_settings(read_config(_folder_of(base)))
    else:
        settings = PUBLIC_BASES[base]
    return config_of(settings, f"`base={base!r}`")


def _folder_of(base: str) -> Path:
    try:
        return local_folder(base, ["config.json"])
    except MissingFileError as error:
        raise MissingFileError(f"{error}{did_you_mean(base, PUBLIC_BASES)}") from error


def _count(devices: Any, device_type: str) -> int:
    """Count the devices that ``trainer.devices`` names."""
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if device_type == "cuda" else 1
    if isinstance(devices, str):
        names = [name for name in devices.split(",") if name]
        return len(names) if len(names) > 1 or devices.endswith(",") else int(devices)
    return len(devices) if isinstance(devices, list) else int(devices)


def _table(plan: MemoryPlan, optimizer: str) -> list[str]:
    """Return bytes by purpose: all of each, and at the fullest moment of a step."""
    moment = plan.fullest
    held = {
        "base in 4 bits": plan.quantised,
        "base, dense": plan.dense,
        "trained, float32": plan.trained,
        f"optimizer states ({optimizer})": plan.optimizer_states,
    }
    rows = [(name, size, size) for name, size in held.items()]
    rows += [
        ("gradients, float32", plan.gradients, moment.gradients),
        ("activations kept for backward", plan.activations, moment.activations),
        ("gathered from other ranks", moment.gathered, moment.gathered),
        ("workspace of the moment", moment.workspace, moment.workspace),
    ]
    cells = [[name, f"{size / 1e9:.3f}", f"{then / 1e9:.3f}"] for name, size, then in rows if size]
    cells.append(["sum", "", f"{plan.peak / 1e9:.3f}"])
    head = ["GB", "in all", "at the fullest moment"]
    table: str = tabulate(cells, head, tablefmt="plain", disable_numparse=True, colalign=("left", "right", "right"))
    lines = table.splitlines()
    lines.append(
        f"Of a moment's workspace, one decoded matrix of an expert is {plan.decoded / 1e9:.3f} GB, the loss's chunk of "
        f"logits {plan.logits_chunk / 1e9:.3f} GB."
    )
    if plan.host:
        lines.append(f"The host holds {plan.host / 1e9:.3f} GB of activations.")
    return lines

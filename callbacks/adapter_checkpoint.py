"""The adapter of a run as PEFT folders: of the newest checkpoint, and of the best validation."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from peft import PeftModel

from lightning_mixcn.arguments import Name, check_arguments
from lightning_mixcn.data import InstructDataModule, PreferenceDataModule
from lightning_mixcn.errors import UserError, did_you_mean
from lightning_mixcn.files.atomic import new_folder, write_json
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.files.schema import MAPPING, expect, record
from lightning_mixcn.metrics import Likelihood
from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.model.checkpoints.identity import IDENTITY_FILE
from lightning_mixcn.model.export.card import CARD_NAME, Training, adapter_card
from lightning_mixcn.modules import CausalLMModule
from lightning_mixcn.modules.checkpoint_schema import require_state
from lightning_mixcn.text import TextTokenizer, load_tokenizer, portable_source
from lightning_mixcn.tokenizer.files import GENERATION_FILE, TOKENIZER_FILES, read_generation, tokenizer_files
from lightning_mixcn.tokenizer.pieces import has_tokenizer
from lightning_mixcn.tokenizer.sentencepiece import PROBES

from .host import causal_lm, plain_name

_TEMPLATE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"
_FAST = "tokenizer.json"


@dataclass(frozen=True)
class ChatFormat:
    """How the answers of a run were laid out.

    Args:
        source: The chat template in Jinja; ``None`` if it cannot be written so.
        end_ids: Tokens that end an answer.
        name: Name of the template in the run's configuration.
    """

    source: str | None
    end_ids: tuple[int, ...]
    name: str


class RunFiles:
    """The files of a run's tokenizer, from which transformers makes the tokenizer that the run used.

    Args:
        trainer: Lightning's; its data are set up.
        module: The module.

    Attributes:
        chat: Layout of answers; ``None`` if the data are no answers.
    """

    def __init__(self, trainer: Trainer, module: CausalLMModule) -> None:
        """Ask the data for tokenizer and template."""
        data: Any = getattr(trainer, "datamodule", None)
        given = getattr(data, "tokenizer", None)  # a data module of somebody else's may have one of transformers'
        self._tokenizer = given if isinstance(given, TextTokenizer) else None
        self._base = module.base_checkpoint.path
        self._source = self._tokenizer.path if self._tokenizer else local_folder(module.tokenizer_path)
        if self._tokenizer is None and has_tokenizer(self._source):
            self._tokenizer = load_tokenizer(self._source)
        self._is_read_right: bool | None = None
        self.chat: ChatFormat | None = None
        if isinstance(data, InstructDataModule | PreferenceDataModule):
            template, tokenizer = data.template, data.tokenizer
            ends = tuple(sorted(template.stop_ids(tokenizer)))
            self.chat = ChatFormat(portable_source(template, tokenizer), ends, data.template_name)

    def write(self, folder: Path) -> None:
        """Write all of them. After training on answers, template and end tokens are those of the answers."""
        # As they are: transformers would write some of the tokenizer's files differently.
        for file in tokenizer_files(self._source):
            shutil.copyfile(file, folder / file.name)
        if self._tokenizer is not None:
            if self.chat is not None and self.chat.source != _own_template(self._tokenizer):
                _replace_template(folder, self.chat.source)
            if self._is_read_right is None:
                self._is_read_right = _is_read_right(folder, self._tokenizer)
            if not self._is_read_right:
                _keep_as_it_is(folder, self._tokenizer)
        settings = self._generation_settings()
        if settings is not None:
            write_json(folder / GENERATION_FILE, settings)

    def _generation_settings(self) -> dict[str, Any] | None:
        """Return those beside the tokenizer, else the base's; after training on answers with an answer's end."""
        files = [place / GENERATION_FILE for place in (self._source, self._base)]
        found = next((file for file in files if file.is_file()), None)
        settings: dict[str, Any] = {} if found is None else read_generation(found)
        if self.chat is None:
            return settings if found else None
        known = settings.get("eos_token_id")
        known = known if isinstance(known, list) else [] if known is None else [known]
        ends = list(dict.fromkeys([*known, *self.chat.end_ids]))
        if self._tokenizer is not None:
            settings.setdefault("bos_token_id", self._tokenizer.bos_id)
        return settings | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def _own_template(tokenizer: TextTokenizer) -> str | None:
    """Return the template in the tokenizer's own files."""
    return str(tokenizer.hf.get_chat_template()) if tokenizer.hf.chat_template else None


def _replace_template(folder: Path, source: str | None) -> None:
    """Make this the only chat template of a tokenizer's folder; ``None``: let it have none."""
    for name in (_TEMPLATE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    settings = _read_json(folder / _SETTINGS)
    if settings.pop("chat_template", None) is not None:
        write_json(folder / _SETTINGS, settings)
    if source is not None:
        (folder / _TEMPLATE).write_text(source, encoding="utf-8")


def _is_read_right(folder: Path, tokenizer: TextTokenizer) -> bool:
    """Return whether transformers reads a folder's tokenizer as the run did."""
    from transformers import AutoTokenizer

    try:
        stock: Any = AutoTokenizer.from_pretrained(folder)
    except Exception:  # where no class is stated it asks for a model's configuration; settings fail in many ways
        return False
    ids = [stock(probe, add_special_tokens=False, split_special_tokens=True)["input_ids"] for probe in PROBES]
    (row,) = tokenizer.encode_batch(["a"])
    return bool(ids == tokenizer.encode_batch(PROBES) and stock("a")["input_ids"] == [*tokenizer.begin_ids, *row])


def _keep_as_it_is(folder: Path, tokenizer: TextTokenizer) -> None:
    """Have transformers take the tokenizer as it is: by its class it would rebuild parts, and some differently."""
    settings = _read_json(folder / _SETTINGS)
    names = {name: str(getattr(tokenizer.hf, name)) for name in ("bos_token", "eos_token")}
    tokenizer.hf.backend_tokenizer.save(str(folder / _FAST))
    write_json(folder / _SETTINGS, names | settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _check_monitor(monitor: str, trainer: Trainer, module: CausalLMModule) -> None:
    """Refuse a value that is never logged, where all that logs is this package's; raises: ValueError."""
    names = getattr(getattr(trainer, "datamodule", None), "source_names", None)
    own = ("lightning_mixcn.", "lightning.")
    loggers = [type(module), *map(type, getattr(trainer, "callbacks", ()))]
    if names is None or not all(kind.__module__.startswith(own) for kind in loggers):
        return
    metrics = ("bits_per_byte", "nll_nats_per_token")
    logged = ["val/bits_per_byte", *(f"val/{name}/{metric}" for name in names("val") for metric in metrics)]
    if monitor not in logged and not monitor.startswith(("train/", "data/", "throughput/")):
        raise UserError(
            f"AdapterCheckpoint: `monitor={monitor}` is not logged{did_you_mean(monitor, logged)}. Validation logs "
            f"{', '.join(sorted(logged))}"
        )


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


_CONFIG = "config.yaml"


def _without_paths(settings: Any) -> Any:
    """Name files and folders of this machine without the path to them, since adapters are made to be shared."""
    if isinstance(settings, dict):
        return {key: _without_paths(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return list(map(_without_paths, settings))
    local = settings.removeprefix("file://") if isinstance(settings, str) else ""
    return Path(local).name if local.startswith(("/", "~")) else settings


# Before the first validation the best value is infinite.
_STATE = record({"measured": MAPPING, "best": expect("a number", lambda value: isinstance(value, int | float))})
ADAPTER_CONFIG = "adapter_config.json"
# By which an adapter's folder is known, and what else is written there.
ADAPTER_FILES = (
    ADAPTER_CONFIG,
    "adapter_model.*",
    IDENTITY_FILE,
    CARD_NAME,
    _CONFIG,
    GENERATION_FILE,
    *TOKENIZER_FILES,
)


class AdapterFolder:
    """Writes the present values of a run's adapter as a PEFT folder, see `AdapterCheckpoint`.

    Args:
        languages: Codes of the languages that the card names.
    """

    def __init__(self, languages: list[Name] | None) -> None:
        self._languages = languages
        self._files: RunFiles | None = None

    def write(self, trainer: Trainer, module: CausalLMModule, name: str, measured: dict[str, Any]) -> None:
        """Replace a folder; all ranks call it, and rank zero writes.

        Args:
            trainer: Lightning's.
            module: The module; without an adapter nothing is written.
            name: Name of the folder in the run's.
            measured: The last validation, for the card: ``step``, and ``sources`` with their likelihoods.
        """
        model = module.model
        if not isinstance(model, PeftModel):
            return
        # Every rank has a part in gathering what is sharded.
        if not trainer.is_global_zero:
            model.save_pretrained("", is_main_process=False)
            return
        root = Path(trainer.default_root_dir)
        with new_folder(root / name, replace=ADAPTER_FILES) as folder:
            model.save_pretrained(str(folder))
            if (root / _CONFIG).is_file():
                text = _without_paths(yaml.safe_load((root / _CONFIG).read_text(encoding="utf-8")))
                (folder / _CONFIG).write_text(
                    yaml.safe_dump(text, allow_unicode=True, sort_keys=False), encoding="utf-8"
                )
            self._run_files(trainer, module).write(folder)
            card = adapter_card(self.training(trainer, module), measured)
            (folder / CARD_NAME).write_text(card, encoding="utf-8")

    def _run_files(self, trainer: Trainer, module: CausalLMModule) -> RunFiles:
        if self._files is None:
            self._files = RunFiles(trainer, module)
        return self._files

    def training(self, trainer: Trainer, module: CausalLMModule) -> Training:
        """Collect the card's facts of the run."""
        files = self._run_files(trainer, module)
        assert module.model is not None
        return Training(
            base=module.base_checkpoint,
            steps=trainer.global_step,
            quantization=module.quantization,
            dtype=module.dtype_name,
            chat_template=files.chat.name if files.chat else None,
            chat_is_portable=files.chat is None or files.chat.source is not None,
            end_ids=files.chat.end_ids if files.chat else (),
            languages=self._languages,
            identity=getattr(module.model, "base_identity", None),
            vocabulary_rows=base_of(module.model).config.vocab_size,
        )


class AdapterCheckpoint(Callback):
    """Writes ``adapter/`` into the run's folder with every checkpoint and at the end, and ``adapter_best/`` beside it.

    A folder has the adapter in PEFT's format, the tokenizer, the run's ``config.yaml`` without paths, and a model card
    with what the last validation measured; after instruction tuning also the chat template that answers were laid out
    with, and the tokens that end them (``generation_config.json``). `mixcn export` and `mixcn chat` take all of these
    from there.
    ``adapter_best/`` is written after a validation that is better than all before; there is none without validation.

    Args:
        folder: Name of the newest adapter's folder inside ``trainer.default_root_dir``; the best one's ends in
            ``_best``.
        monitor: Logged value that decides what is best, such as ``val/zh/bits_per_byte``; null is the mean of the
            validation sources' bits per byte, in which each counts alike, unlike in ``val/bits_per_byte``.
        mode: ``min`` if less of it is better, ``max`` if more is.
        languages: Codes of the languages that the card names, such as ``[zh, en]``; null names none.
    """

    def __init__(
        self,
        folder: Name = "adapter",
        monitor: Name | None = None,
        mode: Literal["min", "max"] = "min",
        languages: list[Name] | None = None,
    ) -> None:
        check_arguments(AdapterCheckpoint, locals())
        self.folder = plain_name("folder", folder)
        self.run_files = (folder, f"{folder}_best")
        self.monitor = monitor
        self._mode, self._sign = mode, 1 if mode == "min" else -1
        self._written_at: int | None = None
        self._best = math.inf  # times the sign
        self._measured: dict[str, Any] = {}  # the last validation: its step and its sources' likelihoods
        self._writer = AdapterFolder(languages)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module, and a monitor that nothing will log."""
        module = causal_lm(self, pl_module)
        if stage == "fit" and self.monitor is not None:
            _check_monitor(self.monitor, trainer, module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say at once what the adapter's folder will lack."""
        module = causal_lm(self, pl_module)
        if trainer.is_global_zero and isinstance(module.model, PeftModel):
            for line in self._writer.training(trainer, module).shortcomings:
                rank_zero_warn(f"{Path(trainer.default_root_dir, self.folder)}: {line}")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know: the best value and its monitor, and the last validation."""
        return {"best": self._best, "measured": self._measured, "monitor": self.monitor, "mode": self._mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; the best value of something else says nothing of this one's."""
        require_state(self, state_dict, _STATE)
        self._measured = state_dict["measured"]
        here = {"monitor": self.monitor, "mode": self._mode}
        # An older checkpoint, which lacks these, is taken to be of the same configuration.
        saved = {name: state_dict.get(name, value) for name, value in here.items()}
        changed = [f"{name} {saved[name]} → {value}" for name, value in here.items() if saved[name] != value]
        if changed:
            self._best = math.inf
            rank_zero_info(f"resume: AdapterCheckpoint {', '.join(changed)}: the best value begins again")
        else:
            self._best = state_dict["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best adapter if this is it. Raises: KeyError if ``monitor`` is not logged."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        module = causal_lm(self, pl_module)
        sources = module.source_likelihoods.get("val", {})
        self._measured = {"step": trainer.global_step, "sources": {name: dict(of) for name, of in sources.items()}}
        value = self._value(trainer, sources)
        if value is not None and self._sign * value < self._best:
            self._best = self._sign * value
            self._writer.write(trainer, module, f"{self.folder}_best", self._measured)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the adapter of this step."""
        self._write_newest(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter of the last step."""
        self._write_newest(trainer, pl_module)
        if self._written_at is not None:
            rank_zero_info(f"adapter: {Path(trainer.default_root_dir, self.folder)}")

    def _value(self, trainer: Trainer, sources: dict[str, Likelihood]) -> float | None:
        if self.monitor is None:
            values = [result["bits_per_byte"] for result in sources.values() if result["bytes"]]
            return sum(values) / len(values) if values else None
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError(f"AdapterCheckpoint: `monitor={self.monitor}` is not logged. Validation logs {known}")
        return float(trainer.callback_metrics[self.monitor])

    def _write_newest(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._written_at != trainer.global_step:
            module = causal_lm(self, pl_module)
            self._written_at = trainer.global_step if isinstance(module.model, PeftModel) else None
            self._writer.write(trainer, module, self.folder, self._measured)

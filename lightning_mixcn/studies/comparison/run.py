"""One run of a comparison: its configuration, the commands that make it, and what came of it."""

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.atomic import remove_path, write_text
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.masking import without_secrets
from lightning_mixcn.text import ConversationSource, Source, parse_sources
from lightning_mixcn.text.corpus.listings import LeftOut, list_files, walk_files
from lightning_mixcn.text.corpus.reading import is_url

# Of a configuration of `mixcn fit`, what `mixcn validate` takes, too.
_SHARED_KEYS = ("seed_everything", "trainer", "model", "data")
_FACTS, _START = "facts.json", "validate.json"

# Of the settings of this project's classes, what changes neither a model before its first step nor the text held out.
_OF_TRAINING = {
    "model": ("optimizer", "lr_scheduler", "learning_rates", "kl_to_base", "train_only", "train_embeddings"),
    "data": ("sources", "seed", "weight_unit", "progress_rows"),
    "trainer": ("default_root_dir", "callbacks", "max_steps", "accumulate_grad_batches", "gradient_clip_val"),
}


@dataclass(frozen=True)
class ComparedRun:
    """An arm with a seed.

    Args:
        arm: Name of the arm.
        seed: Seed of adapters, dropout and the order of the text.
        folder: Folder of the run, with ``start``, ``fit`` and ``evaluate.json``.
        validations: Number of validations on its way.
        trains: Whether it trains, or is validated as it is.
    """

    arm: str
    seed: int
    folder: Path
    validations: int
    trains: bool = True

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm}, seed {self.seed}" if self.trains else self.arm

    def write_config(self, config: Mapping[str, Any], text_bytes: int) -> None:
        """Write ``config.yaml``: the arm's, with this seed, as many bytes of text, and facts kept.

        Args:
            config: The arm's whole configuration, as ``mixcn fit --print_config`` has it.
            text_bytes: Bytes of text that the run sees, where it trains.
        """
        content = json.loads(json.dumps({key: config[key] for key in _SHARED_KEYS if key in config}))
        content["seed_everything"] = self.seed
        for part in ("model", "data"):
            if "seed" in content[part]["init_args"]:
                content[part]["init_args"]["seed"] = self.seed
        trainer = content["trainer"]
        own = trainer.get("callbacks") or []
        budget = {"text_bytes": text_bytes, "validations": self.validations}
        added = {"ByteBudget": budget, "RunFacts": {}} if self.trains else {}
        trainer["callbacks"] = [
            *(callback for callback in own if callback["class_path"].rpartition(".")[2] not in added),
            *({"class_path": f"lightning_mixcn.callbacks.{name}", "init_args": given} for name, given in added.items()),
        ]
        trainer["default_root_dir"] = str(self._fit)
        write_text(self._config, yaml.safe_dump(content, allow_unicode=True, sort_keys=False))

    def validate_command(self) -> list[str]:
        """Return arguments of ``mixcn`` that measure the model before training."""
        bare = ["--trainer.callbacks=null", "--trainer.logger=false"]
        start = f"--trainer.default_root_dir={self.folder / 'start'}"
        return ["validate", "--config", str(self._config), *bare, start]

    def fit_command(self) -> list[str]:
        """Return arguments of ``mixcn`` that train, from the last checkpoint where there is one."""
        resumed = ["--ckpt_path=last"] if (self._fit / "checkpoints" / "last.ckpt").exists() else []
        return ["fit", "--config", str(self._config), *resumed]

    def evaluate_command(self, options: Sequence[str]) -> list[str]:
        """Return arguments of ``mixcn`` that run benchmarks; the model is held as it was trained."""
        model = yaml.safe_load(self._config.read_text(encoding="utf-8"))["model"]["init_args"]
        held = [f"--{name}={model[name]}" for name in ("quantization", "dtype") if name in model]
        evaluated = str(self._fit) if self.trains else model.get("adapter") or model["base"]
        return ["evaluate", evaluated, *held, *options, "--out", str(self.folder / "evaluate.json")]

    def start(self) -> dict[str, Any] | None:
        """Return likelihoods of each source before training, if they were measured."""
        content = _read(self.folder / "start" / _START)
        return None if content is None else dict(content["sources"])

    def take_start(self, others: Sequence["ComparedRun"]) -> bool:
        """Take the likelihoods before training from a run that starts from the same model, on the same held-out text.

        Returns:
            Whether they are there now.
        """
        for other in others:
            if self.start() is None and other.start() is not None and self._starts_as(other):
                (self.folder / "start").mkdir(exist_ok=True)
                write_text(self.folder / "start" / _START, (other.folder / "start" / _START).read_text("utf-8"))
        return self.start() is not None

    def _starts_as(self, other: "ComparedRun") -> bool:
        mine, theirs = self._before_training(), other._before_training()
        return mine is not None and mine == theirs

    def _before_training(self) -> dict[str, Any] | None:
        """Return the settings that the likelihoods before training depend on, if those are known."""
        config = yaml.safe_load(self._config.read_text(encoding="utf-8"))
        model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
        own = all(config[part]["class_path"].startswith("lightning_mixcn.") for part in ("model", "data"))
        lora = (model.get("lora") or {}).get("init_args", {})
        # Factors that are not zero, and rows that are drawn, belong to a seed.
        drawn = model.get("tokenizer") or model.get("lora_start") or lora.get("init_lora_weights", True) is False
        if not own or drawn or not data.get("val_sources"):
            return None
        kept = {"model": model, "data": data, "trainer": trainer}
        found = {
            part: {key: value for key, value in values.items() if key not in _OF_TRAINING[part]}
            for part, values in kept.items()
        }
        found["model"].pop("seed", None)
        return found | {"classes": [config[part]["class_path"] for part in ("model", "data")]}

    def facts(self) -> dict[str, Any] | None:
        """Read what `RunFacts` wrote, if the run came to its end with all validations."""
        facts = _read(self._fit / _FACTS)
        if facts is None or facts["steps"] != facts["planned_steps"]:
            return None
        steps = [validation["step"] for validation in facts["validations"]]
        return facts if len(steps) == self.validations and steps[-1] == facts["steps"] else None

    def scores(self) -> dict[str, Any] | None:
        """Read what `mixcn evaluate` wrote."""
        return _read(self.folder / "evaluate.json")

    def forget_what_cannot_go_on(self) -> None:
        """Remove a fit that has no checkpoint, or that has an end that is not whole."""
        if (self._fit / _FACTS).exists():
            facts = _read(self._fit / _FACTS)
            # A signal ends `fit` early, and properly; at the very last step it leaves out the last validation.
            if facts is not None and facts["steps"] == facts["planned_steps"]:
                remove_path(self._fit)
            else:
                (self._fit / _FACTS).unlink()
        if not (self._fit / "checkpoints" / "last.ckpt").exists():
            remove_path(self._fit)

    @property
    def _fit(self) -> Path:
        return self.folder / "fit"

    @property
    def _config(self) -> Path:
        return self.folder / "config.yaml"


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


_SOURCES = ("sources", "val_sources")
_MODEL_PATHS = ("base", "tokenizer", "adapter", "train_only")


def check_inputs(config: Mapping[str, Any], prepared: Path) -> None:
    """Check that the files that a configuration names are there; what will be prepared may come.

    Args:
        config: A whole configuration of `mixcn fit`.
        prepared: Folder of what will be prepared.

    Raises:
        FileNotFoundError: something is not there.
        ValueError: a source's files cannot be read, or a value is secret, which the runs' configurations would keep.
    """
    for part in _SHARED_KEYS:
        if part in config and without_secrets(config[part]) != config[part]:
            raise UserError(
                f"`{part}` of the recipe's configuration holds a secret, such as a password in a URL, which a study "
                "would write down for each run. Keep it where the driver looks for it, e.g. in the environment, or "
                "download the text first"
            )
    for name, path in _model_paths(config):
        if _is_inside(path, prepared) or (name in ("adapter", "train_only") and Path(path).exists()):
            continue  # an adapter may be a run's folder, which holds it
        if name == "train_only":
            raise MissingFileError(
                f"`model.init_args.train_only={path!r}` is not there. Make it with `mixcn experts --choose`"
            )
        local_folder(path)
    for argument in _SOURCES:
        entries = config["data"]["init_args"].get(argument) or []
        kind: Any = Source if all("text_key" in entry for entry in entries) else ConversationSource
        for index, source in enumerate(parse_sources(entries, argument, kind)):
            if not any(_is_inside(path, prepared) for path in _paths(source.path)):
                list_files(source, f"{argument}[{index}]")


def config_fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """Return size and time of change of all local files that a configuration names, as a digest for each path."""
    texts = [entry["path"] for name in _SOURCES for entry in config["data"]["init_args"].get(name) or []]
    named = [path for _, path in _model_paths(config)] + [path for text in texts for path in _paths(text)]
    return files_fingerprint(named)


def files_fingerprint(paths: Sequence[str]) -> dict[str, str]:
    """Return the same of some paths, folders and globs; what is not on this machine is left out."""
    found = {}
    for path in paths:
        if not is_url(path) and (files := sorted(_files(path))):
            digest = hashlib.sha256()
            for file in files:
                status = file.stat()
                digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
            found[path] = digest.hexdigest()[:16]
    return found


def _files(path: str) -> Iterator[Path]:
    for match in glob.glob(str(Path(path).expanduser()), recursive=True):
        found = walk_files(Path(match), LeftOut(), hidden=True) if Path(match).is_dir() else [Path(match)]
        yield from (file for file in found if file.exists())


def _model_paths(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    arguments = config["model"]["init_args"]
    given = [(name, arguments.get(name)) for name in _MODEL_PATHS]
    return [(name, path) for name, path in given if path and isinstance(path, str)]  # `train_only` may be in place


def _paths(path: str | list[str]) -> list[str]:
    return [path] if isinstance(path, str) else path


def _is_inside(path: str, folder: Path) -> bool:
    return Path(path).absolute().is_relative_to(folder.absolute())

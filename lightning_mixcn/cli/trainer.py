"""``mixcn fit | validate | test | predict``: LightningCLI with this project's classes, defaults and run folder."""

import argparse
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_mixcn.callbacks import (
    AdapterAverage,
    AdapterCheckpoint,
    DataMonitor,
    EpochBudget,
    EvaluationReport,
    ParameterSummary,
    PredictionWriter,
    PreemptionCheckpoint,
    StepCheckpoint,
    StepProgressBar,
)
from lightning_mixcn.callbacks.defaults import logging_callbacks, run_logger, training_callbacks, with_defaults
from lightning_mixcn.callbacks.host import show_text
from lightning_mixcn.commands.functions import add_function_subcommands
from lightning_mixcn.commands.messages import libraries_in_one_line, readable
from lightning_mixcn.commands.table import COMMANDS, TRAINER_DEFAULTS
from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.atomic import write_text
from lightning_mixcn.library_lines import leave_out_of_runs
from lightning_mixcn.modules import CausalLMModule
from lightning_mixcn.modules.learning_rates import make_rated_optimizer, make_rated_schedule, stand_in_names
from lightning_mixcn.modules.run_settings import check_precision
from lightning_mixcn.modules.strategies import check_strategy

from .help import CARD_OPTION, CONFIG_OPTION, OVERWRITE_OPTION, PLAN_OPTION
from .parser import ConfigOption, ConfigurationParser, check_what_is_loaded
from .plan import RunPlan
from .run_folder import (
    CONFIG,
    Overwrite,
    check_free,
    check_outputs,
    check_overwrite,
    mark_failure,
    running,
    scratch_path,
    was_killed_early,
)
from .settings import (
    check_run_settings,
    expand_home,
    fetch_tokenizer,
    forget_tokenizer,
    input_paths,
    mask_settings,
    refuse_masks,
    settle_epochs,
    settle_tokenizer,
)

__all__ = ["MixcnCLI", "PretrainDataModule", "RunConfig", "run_trainer"]

# An option is given in full: `--trainer.max_step 5` is a slip, not a wish for the option that begins like this.
_PARSING = {"exit_on_error": False, "allow_abbrev": False}

_LOADERS = {
    "fit": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


class RunConfig(SaveConfigCallback):
    """Writes the configuration into the run's folder: ``config.yaml`` of `fit`, ``config.<subcommand>.yaml`` else."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, but for `fit` not before the model is there: a folder with ``config.yaml`` holds a run."""
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, and show it to the loggers that take texts."""
        for option in ("plan", "card", "overwrite"):  # which are not the run's, and other subcommands do not know
            self.config.pop(option, None)
        forget_tokenizer(self.config)
        shown = self.config.clone()
        mask_settings(shown)
        text = self.parser.dump(shown, skip_none=False)
        command = trainer.state.fn.value if trainer.state.fn else stage
        name = CONFIG if command == "fit" else f"config.{command}.yaml"
        write_text(Path(trainer.default_root_dir, name), text)
        for logger in trainer.loggers:  # the others have the file
            show_text(logger, "config", f"```yaml\n{text}```", step=0)


class MixcnCLI(LightningCLI):
    """LightningCLI that knows this project's modules by their short names and keeps a run in one folder.

    A run's folder is ``trainer.default_root_dir``, by default ``runs/<name of the first --config>``. Logger,
    checkpoints, monitors of learning rate and data, progress bar and reports are added unless the configuration has
    its own.
    """

    def __init__(self, args: list[str]) -> None:
        self._begins_again = False  # the run that was here was killed before its first checkpoint
        self.plan: RunPlan | None = None
        super().__init__(
            model_class=CausalLMModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            parser_class=ConfigurationParser,
            parser_kwargs={"prog": "mixcn", **_PARSING}
            | {command: {"prog": f"mixcn {command}", **_PARSING} for command in self.subcommands()},
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose ``--config`` knows the names of this package's configurations."""
        parser = self.parser_class(dump_header=[f"lightning.pytorch=={version('lightning')}"], **kwargs)
        parser.add_argument("-c", "--config", action=ConfigOption, help=CONFIG_OPTION)
        return parser

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Add the other subcommands, which `cli` runs without this class, for the completion script."""
        super().setup_parser(*args, **kwargs)
        subcommands = self.parser._subcommands_action  # LightningCLI keeps it to itself
        assert subcommands is not None
        add_function_subcommands(subcommands, COMMANDS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; LightningCLI's own also warns that the arguments might come from Python."""
        try:
            self.config = parser.parse_args(args)
        except UnicodeDecodeError as error:  # of a file that is named in place of a part, or of a pipe
            raise UserError(
                f"a configuration is not UTF-8 (byte {error.start:,} is 0x{error.object[error.start]:02x}). Save it as "
                "UTF-8"
            ) from error
        check_run_settings(self.config[self.config.subcommand])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give `fit` its own options."""
        if parser.prog.endswith(" fit"):
            parser.add_argument("--plan", action="store_true", help=PLAN_OPTION)
            parser.add_argument("--card", type=str | None, default=None, help=CARD_OPTION)
            parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_OPTION)

    def _parse_ckpt_path(self) -> None:
        # LightningCLI lets the hyper-parameters in a checkpoint override the configuration: `base` too, unnoticed.
        # Here the configuration holds, and the module refuses a checkpoint that does not fit it.
        pass

    @property
    def _settings(self) -> Any:
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        """Settle the run's folder and check what can be checked before anything is loaded."""
        settings = self._settings
        if settings.get("card") is not None and not self._planning:
            raise UserError(f"`--card {settings.card}` is what a plan is made for. Add `--plan`, or leave it out")
        if settings.trainer.default_root_dir is None:
            configs = settings.get("config") or []
            name = Path(str(configs[0])).stem if configs else "default"
            settings.trainer.default_root_dir = str(Path("runs", name))
        refuse_masks(settings)
        expand_home(settings)
        self._settle_folder(settings)
        settle_epochs(settings)
        settle_tokenizer(settings)
        if not self._planning:
            fetch_tokenizer(settings)
        if torch.cuda.is_available():
            # TF32 for what is float32: router and LoRA where the compute dtype is float32.
            torch.set_float32_matmul_precision("high")

    def _settle_folder(self, settings: Any) -> None:
        """Keep a run that is there from being replaced, unless that is asked for."""
        self.root = Path(settings.trainer.default_root_dir)
        if self._planning:
            return
        if settings.trainer.fast_dev_run:
            # Callbacks write there whatever the trainer says.
            settings.trainer.default_root_dir = str(scratch_path(self.root))
            rank_zero_info(f"fast_dev_run: nothing is kept, {self.root} stays as it is")
        else:
            self._check_free()

    def _check_free(self) -> None:
        settings = self._settings
        if self.subcommand != "fit" or settings.trainer.fast_dev_run:
            return
        if os.environ.get("LOCAL_RANK", "0") != "0":  # the machine's first one checks, which may have begun to write
            return
        if settings.overwrite:
            check_overwrite(self.root, settings.ckpt_path)
        elif not self._begins_again:
            folders = _checkpoint_folders(settings.trainer.callbacks)
            self._begins_again = settings.ckpt_path is None and was_killed_early(self.root, folders)
            if not self._begins_again:
                check_free(self.root, settings.ckpt_path, folders)

    @property
    def _planning(self) -> bool:
        return bool(self._settings.get("plan"))

    def instantiate_classes(self) -> None:
        """Make the classes; for a plan no trainer, whose devices need not be there."""
        with libraries_in_one_line(type(self)):
            if not self._planning:
                super().instantiate_classes()
            else:
                self.config_init = self.parser.instantiate_classes(self.config)
                self.datamodule, self.model = (self._get(self.config_init, name) for name in ("data", "model"))
        loader = _LOADERS[self.subcommand or "fit"]
        if self.datamodule is None and not is_overridden(loader, self.model, LightningModule):
            raise UserError(
                f"`data` is missing: give a data module, e.g. `--data PretrainDataModule`, or a module with `{loader}`"
            )

    def _run_subcommand(self, subcommand: str) -> None:
        if self._planning:
            settings, card = self._get(self.config_init, "trainer"), self._settings.card
            self.plan = RunPlan(settings, self.model, self.datamodule, card)
            return
        trains = False
        try:
            with running(self.trainer, self.root, subcommand):
                if self.trainer.is_global_zero:
                    self._check_free()  # again: another run may just have ended there
                    trains = subcommand == "fit" and not self._settings.trainer.fast_dev_run
                super()._run_subcommand(subcommand)
        except BaseException:
            if trains:
                mark_failure(self.root, _checkpoint_folders(self._settings.trainer.callbacks))
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with the callbacks and the logger of a run where the configuration has none of its own."""
        settings = self._get(self.config_init, "trainer")
        check_strategy(settings.strategy)
        root = self.root
        if settings.logger in (None, True):
            kwargs["logger"] = run_logger(root)
        given = settings.callbacks if isinstance(settings.callbacks, list) else [settings.callbacks]
        own = [callback for callback in given if callback is not None]
        callbacks = with_defaults(own, self._default_callbacks(settings), root)
        check_outputs(root, callbacks, trains=self.subcommand == "fit" and not settings.fast_dev_run)
        # By what all ranks know alike: a later one may find that the first has begun. Where no run is, it removes none.
        if self.subcommand == "fit" and self._settings.ckpt_path is None and not settings.fast_dev_run:
            adapters = [callback.folder for callback in callbacks if isinstance(callback, AdapterCheckpoint)]
            folders = [name for folder in adapters or ["adapter"] for name in (folder, f"{folder}_best")]
            folders += [callback.folder for callback in callbacks if isinstance(callback, AdapterAverage)]
            callbacks.insert(0, Overwrite(root, folders, input_paths(self._settings)))
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def after_instantiate_classes(self) -> None:
        """Refuse, before anything is read or written, what could not work.

        A checkpoint that is not there is one: Lightning would evaluate the base without a word.
        """
        if self._planning:
            return
        check_precision(self.trainer.precision)
        if self.subcommand == "fit" and isinstance(self.model, CausalLMModule):
            try_optimization(self.model, self._settings.model.init_args)
        path = self._settings.get("ckpt_path")
        folders = [str(getattr(callback, "dirpath", "")) for callback in self.trainer.checkpoint_callbacks]
        if path == "last" and self.subcommand != "fit" and not any(list(Path(f).glob("last*")) for f in folders):
            raise MissingFileError(f"`--ckpt_path last`: there is no checkpoint in {', '.join(folders)}. Run fit first")
        if path == "best" or (path == "hpc" and not any(self.root.glob("hpc_ckpt_*.ckpt"))):
            raise MissingFileError(f"`--ckpt_path {path}`: {self.root} has none yet. Give a checkpoint, or `last`")
        if path and path not in ("last", "best", "hpc") and "://" not in path:
            if not Path(path).exists():
                raise MissingFileError(f"`--ckpt_path {path}` is not there. Give a checkpoint of a run, or `last`")
            if not (Path(path).is_file() or Path(path).is_dir()):
                raise UserError(f"`--ckpt_path {path}` is neither a file nor a folder. Give a checkpoint, or `last`")

    def after_fit(self) -> None:
        """End as a command that Ctrl-C has ended, so that a script does not go on with a run that is not whole.

        One rank is enough: a launcher would take another's for a crash, and end them all.
        """
        preempting = [callback for callback in self.trainer.callbacks if isinstance(callback, PreemptionCheckpoint)]  # type: ignore[attr-defined]
        if self.trainer.is_global_zero and any(callback.interrupted for callback in preempting):
            raise KeyboardInterrupt

    def _default_callbacks(self, settings: Any) -> list[Callback]:
        # Always: it has a state, which Lightning misses in `predict --ckpt_path` if the callback is not there.
        callbacks: list[Callback] = [DataMonitor()]
        if self.subcommand == "fit":
            callbacks += training_callbacks()
            if settings.max_steps in (None, -1) and not settings.fast_dev_run:
                callbacks.append(EpochBudget())
        if settings.enable_checkpointing is not False:
            callbacks += [StepCheckpoint(), AdapterCheckpoint()]
        if settings.logger not in (False, []) and self.subcommand == "fit":
            callbacks += logging_callbacks()
        if settings.enable_progress_bar is not False:
            callbacks.append(StepProgressBar())
        if settings.enable_model_summary is not False:
            callbacks.append(ParameterSummary())
        if self.subcommand == "predict":
            callbacks.append(PredictionWriter())
        if self.subcommand in ("validate", "test"):
            callbacks.append(EvaluationReport())
        return callbacks


def try_optimization(module: CausalLMModule, arguments: Any) -> None:
    """Make optimizer and schedule of a few numbers, so that what they refuse is known before the model is loaded.

    Args:
        module: The module. One with its own `configure_optimizers`, such as of several groups, is left alone.
        arguments: Its arguments in the configuration; an optimizer that is a function may want the model's parameters,
            and is left alone.

    Raises:
        ValueError: see `make_rated_optimizer` and `make_rated_schedule`.
    """
    is_own = type(module).configure_optimizers is not CausalLMModule.configure_optimizers
    if is_own or isinstance(arguments.get("optimizer"), str):
        return
    parameters = [(name, torch.nn.Parameter(torch.zeros(1, 1))) for name in stand_in_names()]
    optimizer = make_rated_optimizer(module.make_optimizer, parameters, module.learning_rates)
    make_rated_schedule(module.make_lr_scheduler, optimizer, module.learning_rates)


def run_trainer(arguments: list[str]) -> RunPlan | None:
    """Parse ``fit …`` and the like, and run it.

    Args:
        arguments: With the subcommand first, or an option of the whole program.

    Returns:
        The plan, where only that was asked for.

    Raises:
        UserError: the command line or the configuration cannot be used; names the key.
    """
    _quieten()
    set_parsing_settings(add_print_completion_argument=True)
    check_what_is_loaded()
    try:
        return MixcnCLI(arguments).plan
    except argparse.ArgumentError as error:
        raise UserError(f"{readable(str(error))}. See mixcn {arguments[0]} --help") from error


def _checkpoint_folders(callbacks: Any) -> list[str]:
    """Return folders that the configured callbacks keep checkpoints in, besides the run's own."""
    given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    folders = [callback.get("init_args", {}).get("dirpath") for callback in given]
    return [folder for folder in folders if folder is not None]


def _quieten() -> None:
    """Keep out of the output what concerns neither the user nor this project."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls jsonargparse by old names
    warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored")  # PEFT's own default
    leave_out_of_runs()

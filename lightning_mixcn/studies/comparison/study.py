"""Run the arms of a recipe on the same bytes of text, and write a table of what came of it."""

import csv
import fcntl
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from lightning_mixcn.commands import process as commands
from lightning_mixcn.errors import ExistingFileError, MissingFileError, UserError
from lightning_mixcn.files.atomic import new_file, remove_leftovers, write_json, write_text
from lightning_mixcn.files.lock import lock_path
from lightning_mixcn.studies.parts import check_settings, say
from lightning_mixcn.studies.tables import csv_text
from lightning_mixcn.studies.tasks import require_harness

from .differences import Rows
from .recipe import PREPARED, Recipe, read_recipe
from .results import (
    as_json,
    as_markdown,
    require_same_text,
    run_cost,
    run_result,
    runs_as_csv,
    save_curves,
)
from .run import ComparedRun, check_inputs, config_fingerprint, files_fingerprint

_STUDY, _TABLE, _REPORT = "study.json", "comparison.md", "comparison.json"
_CURVES, _RESULTS, _COSTS = "comparison.png", "comparison.csv", "costs.csv"
_WRITTEN = (_STUDY, _TABLE, _REPORT, _CURVES, _RESULTS, _COSTS)


def write_again(folder: Path) -> str:
    """Write tables and figure of a finished study again from its results: its runs and its recipe may be gone.

    Args:
        folder: Folder of the study, which another version may have made.

    Returns:
        The tables in Markdown.

    Raises:
        FileNotFoundError: there is no finished study.
    """
    if not (folder / _REPORT).is_file():
        raise MissingFileError(
            f"`recipe={str(folder)!r}` is a folder without {_REPORT}. Give a recipe, or the folder of a finished study"
        )
    report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    with (folder / _COSTS).open(encoding="utf-8", newline="") as opened:
        costs = [
            {name: value if name == "arm" else float(value) for name, value in line.items()}
            for line in csv.DictReader(opened)
        ]
    return _write(folder, report["settings"], report["runs"], costs)


def run_study(recipe: Path, folder: Path, quick: bool) -> str:
    """Prepare, train and evaluate every arm, and write the tables, which are returned; see the command ``compare``."""
    _check_folder(folder)
    study = read_recipe(recipe, quick)
    prepared = folder / "prepared"
    _check_commands(study, prepared)
    configs = {arm: _configuration(study, arm, prepared) for arm in study.arms}
    for config in configs.values():
        check_inputs(config, prepared)
    settings = _settings(study, configs, prepared)
    _open(folder, settings)
    with _alone(folder) as lock:
        if (folder / _REPORT).is_file():
            say(f"{folder} was finished before.")
            return write_again(folder)
        return _Study(study, folder, configs, lock).run(settings)


@dataclass
class _Study:
    """What is done, one after the other; what is there already is kept."""

    recipe: Recipe
    folder: Path
    configs: dict[str, dict[str, Any]]
    lock: int
    _number: int = field(init=False, default=0)
    _seconds: dict[str, list[float]] = field(init=False, default_factory=lambda: defaultdict(list))

    def run(self, settings: dict[str, Any]) -> str:
        """Do it all, write the tables, and return them."""
        recipe, prepared = self.recipe, self.folder / "prepared"
        runs = [
            ComparedRun(arm, seed, self.folder / "runs" / arm / f"seed{seed}", recipe.validations, recipe.train)
            for seed in recipe.seeds
            for arm in recipe.arms
        ]
        for run in runs:
            run.write_config(self.configs[run.arm], recipe.text_bytes)
        trained, evaluated = runs if recipe.train else [], runs if recipe.evaluate else []
        self._left = {"prepare": len(recipe.prepare), "start": len(runs)}
        self._left |= {"fit": len(trained), "evaluate": len(evaluated)}
        self._total = sum(self._left.values())
        prepared.mkdir(exist_ok=True)
        for name, command in recipe.commands(prepared).items():
            self._do("prepare", name, (prepared / name).exists(), partial(list, command))
        for run in runs:
            self._do("start", run.name, run.take_start(runs), run.validate_command)
        require_same_text({run.name: run.start() or {} for run in runs})
        for run in trained:
            self._fit(run)
        for run in evaluated:
            evaluates = partial(run.evaluate_command, recipe.evaluate)
            self._do("evaluate", run.name, run.scores() is not None, evaluates)
        costs = [run_cost(run) for run in trained]
        write_text(self.folder / _COSTS, csv_text(costs))
        return _write(self.folder, settings, [run_result(run) for run in runs], costs)

    def _fit(self, run: ComparedRun) -> None:
        if run.facts() is None:
            run.forget_what_cannot_go_on()
        self._do("fit", run.name, run.facts() is not None, run.fit_command)
        if run.facts() is None:
            raise commands.CommandFailed(
                f"the run of {run.name} ended early: a signal asked it to, or its sources end. The same command goes "
                "on with it"
            )

    def _do(self, kind: str, name: str, is_done: bool, command: Callable[[], list[str]]) -> None:
        """Run a command unless its result is there, and say how far the study is."""
        self._number += 1
        says = f"[{self._number}/{self._total}] {kind}: {name}"
        if is_done:
            say(f"{says} (kept)")
        else:
            left = self._seconds_left()
            say(says if left is None else f"{says}; about {left / 60:.0f} minutes left")
            start = time.perf_counter()
            commands.run_mixcn(command(), inherited=(self.lock,))
            self._seconds[kind].append(time.perf_counter() - start)
        self._left[kind] -= 1

    def _seconds_left(self) -> float | None:
        """Estimate from what each kind took so far; ``None`` while a kind has not been measured."""
        left = {kind: number for kind, number in self._left.items() if number}
        if any(not self._seconds[kind] for kind in left):
            return None
        return sum(number * fmean(self._seconds[kind]) for kind, number in left.items())


def _write(folder: Path, settings: Mapping[str, Any], results: Rows, costs: Rows) -> str:
    """Write tables and figure, each whole or not at all, the report last, and return the tables."""
    title = settings["title"]
    tables = as_markdown(title, results, costs)
    with new_file(folder / _CURVES, replace=True) as unfinished:
        save_curves(unfinished, results, title)
    write_text(folder / _RESULTS, runs_as_csv(results))
    write_text(folder / _TABLE, tables)
    write_text(folder / _REPORT, as_json(settings, results))
    return tables


def _check_folder(folder: Path) -> None:
    remove_leftovers(folder, "|".join(map(re.escape, _WRITTEN)))
    # What is there of its own accord in the top folder of a file system, and this process's lock.
    expected = ("lost+found", lock_path(folder.absolute()).name)
    there = folder.is_dir() and any(path.name not in expected for path in folder.iterdir())
    if there and not (folder / _STUDY).is_file():
        raise ExistingFileError(f"`out={str(folder)!r}` is a folder with something else in it. Choose another")
    if folder.exists() and not folder.is_dir():
        raise ExistingFileError(f"`out={str(folder)!r}` is a file, expected a folder. Choose another")


def _check_commands(study: Recipe, prepared: Path) -> None:
    """Parse the commands of the recipe, without running them."""
    # Here, since it is the command line that imports the studies, not the other way round.
    from lightning_mixcn.commands.functions import parse_function
    from lightning_mixcn.commands.table import FUNCTIONS

    wanted = study.commands(prepared)
    if study.evaluate:
        require_harness()
        wanted["evaluate"] = ["evaluate", "RUN", *study.evaluate, "--out", "evaluate.json"]
    for name, (command, *arguments) in wanted.items():
        if command not in FUNCTIONS or command == "compare":
            raise UserError(f"{name!r} of the recipe: {command!r} is no command. Expected e.g. [vocab, train, …]")
        try:
            parse_function(command, arguments)
        except UserError as error:
            raise UserError(f"{name!r} of the recipe: {error}") from error


def _configuration(study: Recipe, arm: str, prepared: Path) -> dict[str, Any]:
    """Return the whole configuration of an arm, which `mixcn fit` has checked, key by key."""
    try:
        printed = commands.output_of_mixcn(["fit", *study.options(arm, prepared), "--print_config"])
    except commands.CommandFailed as error:
        raise UserError(f"arm {arm!r} of the recipe: {error}") from error
    config: dict[str, Any] = yaml.safe_load(printed)
    for key in (*study.settings, *study.arms[arm]):
        _require_key(config, key, arm)
    return config


def _require_key(config: dict[str, Any], key: str, arm: str) -> None:
    """`--print_config` overlooks options that there are not."""
    place: Any = config
    for name in key.removesuffix("+").split("."):
        if isinstance(place, dict) and name not in place:  # `lora.r` is short for `lora.init_args.r`
            place = place.get("init_args")
        if not isinstance(place, dict) or name not in place:
            raise UserError(f"arm {arm!r} of the recipe: there is no setting {key!r}. See mixcn fit --help")
        place = place[name]


def _settings(study: Recipe, configs: dict[str, Any], prepared: Path) -> dict[str, Any]:
    """Return all that the results depend on, as JSON has it."""
    named = [part for command in study.commands(prepared).values() for part in command[1:]]
    inputs = files_fingerprint([part for part in named if not part.startswith(str(prepared))])
    for config in configs.values():
        inputs |= {path: of for path, of in config_fingerprint(config).items() if not path.startswith(str(prepared))}
    settings = asdict(study) | {"configurations": configs, "inputs": inputs}
    del settings["config"]  # where it was; its content is in the arms' configurations
    if study.train:  # as in studies from before there was a choice
        del settings["train"]
    # Not the study's folder: the same one elsewhere has the same settings.
    plain: dict[str, Any] = json.loads(json.dumps(settings).replace(json.dumps(str(prepared))[1:-1], PREPARED))
    return plain


def _open(folder: Path, settings: dict[str, Any]) -> None:
    """Go on with the study of a folder, if it is this one, or begin it."""
    if (folder / _STUDY).is_file():
        check_settings(json.loads((folder / _STUDY).read_text(encoding="utf-8")), settings, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _STUDY, settings, indent=1)


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Wait until no other process works on the study; a command that outlived its study counts.

    flock itself and not `filelock`, which unlocks on release: then a command that inherited the descriptor, such as a
    run that still saves after Ctrl-C, would hold nothing any more. The folder itself is locked: no file has to stay.

    Yields:
        Descriptor of the lock, for commands to inherit.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"Another process works on {folder}, perhaps a command that outlived its study: waiting for its end.")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # NFS locks no folders
        say(f"{folder} cannot be locked: see that no second process works on it.")
    try:
        yield lock
    finally:
        os.close(lock)

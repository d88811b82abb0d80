"""Tasks of lm-evaluation-harness by name: found, and their data read, before any model is.

Task definitions are used as the harness ships them; nothing here changes a prompt or a metric.
"""

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lightning_mixcn.errors import MissingFileError, UserError, require_package
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.files.schema import TEXT, each, mapping_of, record

from .task_files import BenchmarkFiles

_LOGGER = "lm_eval"


@dataclass(frozen=True)
class Benchmarks:
    """Tasks that can be run.

    Args:
        names: As asked for: tasks, groups of tasks (``mmlu``) or tags.
        tasks: The harness's task objects, by name, in the order in which they are run.
        groups: The harness's group objects, by name; a group's scores are aggregated from those of its tasks.
    """

    names: tuple[str, ...]
    tasks: dict[str, Any]
    groups: dict[str, Any]

    @property
    def shots(self) -> dict[str, int]:
        """Number of examples in each task's prompts."""
        return {name: int(task.get_config("num_fewshot")) for name, task in self.tasks.items()}


class LanguageGroup(NamedTuple):
    """Tasks and groups of the harness in one language.

    Args:
        language: Code of the language, e.g. ``zh``.
        tasks: Their names.
    """

    language: str
    tasks: tuple[str, ...]


@lru_cache(maxsize=1)
def language_groups() -> dict[str, LanguageGroup]:
    """Return the groups of tasks by language, e.g. ``chinese``, which are names of this project, not of the harness."""
    check = mapping_of(TEXT, record({"language": TEXT, "tasks": each(TEXT)}))
    found = read_object(Path(__file__).with_name("task_groups.json"), check, remedy="Install the package again")
    return {name: LanguageGroup(group["language"], tuple(group["tasks"])) for name, group in found.items()}


def require_harness() -> None:
    """Refuse to go on without lm-evaluation-harness. Raises: ModuleNotFoundError: says how to install it."""
    require_package("lm_eval", "what runs benchmarks, lm-evaluation-harness,")


def split_names(tasks: Sequence[str]) -> list[str]:
    """Return names of tasks, which may be given one by one or with commas between them.

    A group by language, such as ``chinese``, is replaced by its tasks.

    Raises:
        ValueError: none is given, or one is given twice.
    """
    given, groups = [name.strip() for part in tasks for name in part.split(",") if name.strip()], language_groups()
    names = [task for name in given for task in (groups[name].tasks if name in groups else (name,))]
    if not names:
        raise UserError("`tasks` is empty. Give at least one task, e.g. ceval-valid,cmmlu,mmlu,hellaswag")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"`tasks` has {name!r} twice. Give it once")
    return names


def check_limit(limit: float | None) -> None:
    """Raise ValueError unless a limit is a number of documents, or a share of them."""
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise UserError(f"`limit={limit}`: expected a whole number of documents, or a share of them below 1")


@lru_cache(maxsize=1)
def task_manager() -> Any:
    """Index the harness's tasks; reading its thousands of files takes 10 to 20 seconds, once a process."""
    require_harness()
    from lm_eval.tasks import TaskManager

    return TaskManager()


def load_benchmarks(
    tasks: Sequence[str], *, num_fewshot: int | None = None, files: BenchmarkFiles | None = None
) -> Benchmarks:
    """Find tasks and read their data.

    Args:
        tasks: Names of tasks, groups or tags.
        num_fewshot: Examples in a prompt; ``None`` leaves each task's own number, and a task that is defined with none
            keeps none, both as in the harness.
        files: Data on this machine instead of the hub's.

    Raises:
        ValueError: the harness is not installed, no such task, a task that is in two of the groups, one that runs
            code or needs pictures, or data that lacks what the task reads.
        FileNotFoundError: a task's data is not there.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"`num_fewshot={num_fewshot}`: expected at least 0 examples")
    names = split_names(tasks)
    require_harness()
    manager = task_manager()
    for name in names:
        _check_name(name, manager.all_tasks)
    found = Benchmarks(tuple(names), {}, {})
    with files.in_place_of_hub() if files else nullcontext():
        for name in names:
            loaded = _load(manager, name)
            if twice := sorted(found.tasks.keys() & loaded["tasks"].keys()):
                raise UserError(f"`tasks`: {twice[0]!r} is also in another of {', '.join(names)}. Leave one out")
            found.tasks.update(loaded["tasks"])
            found.groups.update(loaded.get("groups") or {})
    for name, task in found.tasks.items():
        _check_kind(name, task)
        _set_shots(task, num_fewshot)
    return found


@contextmanager
def harness_messages() -> Iterator["HarnessMessages"]:
    """Catch what the harness logs below errors: it warns of what is meant here, and once for each prompt it cuts."""
    logger, caught = logging.getLogger(_LOGGER), HarnessMessages()
    propagate, handlers = logger.propagate, logger.handlers
    logger.propagate, logger.handlers = False, [caught]
    try:
        yield caught
    finally:
        logger.propagate, logger.handlers = propagate, handlers


class HarnessMessages(logging.Handler):
    """Counts the harness's messages about prompts that are too long; errors still reach standard error.

    Attributes:
        prompts_cut: Prompts that were longer than the model reads, and lost their beginning.
    """

    prompts_cut = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Take one message."""
        message = record.getMessage()
        if "Truncating" in message or "Left truncation" in message:
            self.prompts_cut += 1
        elif record.levelno >= logging.ERROR and logging.lastResort is not None:
            logging.lastResort.handle(record)


def _check_name(name: str, known: Sequence[str]) -> None:
    if name in known:
        return
    groups = language_groups()
    close = difflib.get_close_matches(name, [*groups, *known], n=5, cutoff=0.5)
    hint = f"Did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists them"
    hint += f" Groups by language here are {', '.join(groups)}"
    raise UserError(f"`tasks`: lm-evaluation-harness has no task {name!r}. {hint}")


def _load(manager: Any, name: str) -> Any:
    """Return one name's tasks and groups; errors of its data name the task."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        with harness_messages():
            return manager.load([name])
    except FileNotFoundError as error:
        if isinstance(error, DatasetNotFoundError) or not type(error).__module__.startswith("builtins"):
            raise MissingFileError(f"task {name!r}: {error}. Give its data with `data_dir`") from error
        raise MissingFileError(f"task {name!r}: {error}") from error
    except OSError as error:  # the hub cannot be reached
        raise MissingFileError(
            f"task {name!r}: its data could not be read ({type(error).__name__}: {error}). Give it with `data_dir`"
        ) from error
    except KeyError as error:  # the harness looks splits up as they are named
        raise UserError(f"task {name!r} reads the split {error}, which its data does not have. Add it") from error
    except ValueError as error:  # of the datasets library: no such configuration, broken files
        raise UserError(f"task {name!r}: its data cannot be used: {error}") from error


def _check_kind(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"`tasks`: {name!r} runs code that the model writes. Run it with lm_eval in a sandbox")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"`tasks`: {name!r} has pictures or sound, which a model of text cannot take. Leave it out")


def _set_shots(task: Any, num_fewshot: int | None) -> None:
    """Return them as `lm_eval.simple_evaluate` does."""
    defined = task.get_config("num_fewshot")
    if num_fewshot is not None and defined != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif defined is None:
        task.set_config(key="num_fewshot", value=0)


def weighted_metrics(group: Any) -> set[str]:
    """Return the metrics of a group that are means over all its documents."""
    return {config.metric for config in group.aggregate_metric_list or () if config.weight_by_size}

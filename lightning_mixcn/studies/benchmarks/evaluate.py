"""The subcommand ``evaluate``: benchmarks through lm-evaluation-harness, a base beside its adapted self."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_mixcn.errors import ExistingFileError, UserError
from lightning_mixcn.model.options import ModelOptions

from .options import EvaluationOptions


def evaluate(
    src: str,
    *,
    out: str,
    options: EvaluationOptions,
    adapter: Literal["on", "off", "both"] | None = None,
    languages: Sequence[str] = (),
    submission: str | None = None,
    model: ModelOptions,
    shard: bool = False,
) -> None:
    """Run benchmarks of lm-evaluation-harness, its definitions and scoring untouched. It resumes after a kill.

    Prints a table by language: base beside adapted, standard errors, and a paired test over the same documents. On
    several GPUs: torchrun --nproc-per-node N -m lightning_mixcn evaluate …; each process has the model, and takes every
    N-th batch, so that the figures are those of one process.

    Args:
        src: Hugging Face folder or hub id, 4-bit folder of `mixcn quantize`, run folder, or PEFT adapter folder.
        out: JSON file to write: settings, the harness's figures of every task, the comparison. Until it is whole, its
            parts are in the hidden folder .OUT.unfinished beside it.
        options: Measurements.
        adapter: on, off or both; null is both where SRC has an adapter, which shows the base beside the adapted model.
        languages: Languages of further tasks, as pattern=language, e.g. xnli_vi=vi.
        submission: JSON file to write: answers to C-Eval's hidden test split (12,342 questions), for its site.
        model: Loading of the models.
        shard: Let several processes share the weights (FSDP2) instead of holding all of them each, for a model that
            one GPU does not hold. Slower; figures agree with one process's but for rounding.

    Raises:
        ValueError: an unknown task, an option out of its range, or lm-evaluation-harness is not installed.
        FileNotFoundError: no such model, data or text.
        FileExistsError: an output is there, or belongs to an evaluation with other arguments.
    """
    from .plan import run_evaluation

    target, answers = Path(out).expanduser(), Path(submission).expanduser() if submission else None
    _check_targets(target, answers)
    run_evaluation(src, target, options, adapter, languages, answers, model, shard)


def _check_targets(target: Path, answers: Path | None) -> None:
    for name, path in (("out", target), ("submission", answers)):
        if path is not None and path.is_dir():
            raise ExistingFileError(f"`{name}={str(path)!r}` is a folder, expected a file to write. Choose another")
    if answers is not None and answers == target:
        raise UserError(f"`submission` and `out` are both {str(target)!r}. Choose another for one of them")

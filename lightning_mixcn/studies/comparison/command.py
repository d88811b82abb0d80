"""The subcommand ``compare``: the same bytes of text for each arm of a recipe, and a table of what came of it."""

from pathlib import Path

from lightning_mixcn.errors import UserError


def compare(recipe: str, *, out: str | None = None, quick: bool = False) -> None:
    """Train each arm of a recipe on the same bytes of text and compare. It resumes after a kill.

    Prints a table: bits per byte of every source before and after, tokens, speed, memory, and task scores where the
    recipe asks for them, with their spread over seeds; and each arm's difference from the first one, with its 95 %
    interval over seeds.

    Args:
        recipe: YAML file, e.g. configs/studies/vocabulary.yaml, which says what its keys mean. Or the folder of a
            finished study: its tables and figure are written again, nothing is trained. The cost is, for each
            arm and seed, a validation, a training run over its `text_bytes` and what it evaluates, one after the
            other. Mixtral-8x7B on 100 MB (25 million tokens of 3 × 26 GFLOP): 2e18 FLOP a run, by arithmetic 2.7 hours
            at 200 TFLOP/s.
        out: Folder of the study: comparison.md (tables), comparison.csv and comparison.json (results; a rerun gives
            them again), costs.csv (speed, time, memory), comparison.png (bits per byte against bytes of text), and the
            runs themselves.
        quick: Take the recipe's `quick` values, made to try it in minutes on the base that `make demo` makes.

    Raises:
        FileNotFoundError: the recipe, a finished study, its configuration, or something that it needs is not there.
        ValueError: the recipe, an arm's settings or a command in it cannot be used; nothing was started then.
        FileExistsError: the folder holds something else, or a study with other values.
        CommandFailed: a command ended with an error, which it printed.
    """
    from .study import run_study, write_again

    if not (is_folder := Path(recipe).expanduser().is_dir()) and out is None:
        raise UserError("`out`: expected the folder of the study, as --out studies/vocabulary")
    if is_folder and (out is not None or quick):
        raise UserError(
            f"`recipe={recipe!r}` is a folder: a finished study takes no `out` and no `quick`. Leave them out"
        )
    if out is None:
        print(write_again(Path(recipe).expanduser()))
    else:
        print(run_study(Path(recipe), Path(out).expanduser(), quick))

"""The subcommand ``preference``: blind sheets of models' answers, what filled-in sheets say, and pairs to train on."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from lightning_mixcn.arguments import Count, Name, Seed
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import check_file, check_output, new_file, new_folder
from lightning_mixcn.model.inference.sampling import Sampling
from lightning_mixcn.model.options import ModelOptions


def sheet(
    models: list[str],
    *,
    questions: str,
    out: Name,
    template: str | None = None,
    questions_per_pair: Count | None = None,
    sampling: Sampling,
    seed: Seed = 0,
    model: ModelOptions,
) -> None:
    """Let two or more models answer questions, and write blind sheets for judges. It resumes after a kill.

    Give a judge sheet.html (a page that needs nothing else and saves the judge's CSV) or sheet.csv (for a spreadsheet),
    and nothing else of the folder: key.json and answers.jsonl name the models. The cost is one forward pass of one
    token for each token of an answer: models × questions × tokens of an answer.

    Args:
        models: Each a Hugging Face folder or hub id, 4-bit folder of `mixcn quantize`, run folder, or PEFT adapter
            folder. Models are loaded one after the other. Every pair of them gets the questions: three models, three
            times as many items.
        questions: Text, one question a line, or JSON or JSON Lines with `question` (and `system`), with `messages`, or
            training conversations, whose last answer is left out.
        out: Folder to make: sheet.csv, sheet.html, key.json, answers.jsonl. Until it is whole, finished answers are in
            the hidden folder .OUT.unfinished beside it.
        template: ``mixtral``, ``tokenizer`` for the chat template of each model's tokenizer, or a Jinja file. Null is
            the one that each model carries, else ``mixtral``.
        questions_per_pair: Draw so many questions for each pair of models; null takes all.
        sampling: Choice of tokens.
        seed: Seed of the answers' random numbers, the sides and the order.
        model: Loading of the models.

    Raises:
        ValueError: fewer than two models, an option out of its range, or a question that cannot be asked.
        FileNotFoundError: no such model, template or file.
        FileExistsError: the folder holds something else, or a sheet with other arguments.
    """
    from .study import answer_and_lay_out

    _check_models(models)
    folder = Path(out).expanduser().resolve()
    answer_and_lay_out(models, questions, folder, template, questions_per_pair, sampling, seed, model)


def score(sheets: list[str], *, out: Name, key: str | None = None, seed: Seed = 0) -> None:
    """Write win rates, Elo and agreement of filled-in sheets of `mixcn preference sheet`. Takes seconds.

    Args:
        sheets: Filled-in sheets, one a judge, whom the file's name names. A verdict is left, right or tie (左, 右, 平);
            empty where there is none.
        out: Folder to make: pairs.csv, models.csv, judges.csv, table.txt and preference.json. Elo is the maximum of
            the Bradley-Terry likelihood, which knows no order of the matches; a tie is half a win for both; the first
            model has 1000. Intervals are of 95 %: Wilson's over questions; of Elo, questions are drawn again.
        key: The sheets' key.json; null takes the one beside the first sheet.
        seed: Seed of the intervals' resampling.

    Raises:
        ValueError: an unknown verdict, item or column, an item twice, or a sheet without any verdict.
        FileNotFoundError: no such sheet or key.
        FileExistsError: OUT is not empty.
    """
    from .matches import read_matches
    from .report import preference_table, write_preferences
    from .scores import PreferenceScores

    folder = Path(out).expanduser().resolve()
    check_output(folder)
    matches = read_matches(sheets, key)
    scores = PreferenceScores(matches, seed)
    with new_folder(folder) as unfinished:
        write_preferences(unfinished, scores)
    print(preference_table(scores))


def pairs(sheets: list[str], *, out: Name, key: str | None = None) -> None:
    """Write pairs to train on from filled-in sheets of `mixcn preference sheet`. Takes seconds.

    Args:
        sheets: Filled-in sheets, one a judge, as in `mixcn preference score`. An item becomes a pair where more than
            half of its verdicts are for the same side; ties and all others are left out and counted, as are equal and
            empty answers.
        out: JSON Lines file to make, for `PreferenceDataModule`: prompt, chosen, rejected, and beside them the models,
            the item and each judge's verdict.
        key: The sheets' key.json, with the sheet's answers.jsonl beside it; null takes the one beside the first sheet.

    Raises:
        ValueError: an unknown verdict, item or column, an item twice, a sheet without any verdict, a damaged
            answers.jsonl, or not one pair.
        FileNotFoundError: no such sheet, key or answers.jsonl.
        FileExistsError: OUT is there.
    """
    from .matches import place_of_key, read_matches
    from .pairs import ANSWERS, AnswerFile, jsonl, preferred_pairs, told

    file = Path(out).expanduser().resolve()
    check_file(file)
    matches = read_matches(sheets, key)
    records, left_out = preferred_pairs(matches, AnswerFile(place_of_key(sheets[0], key).with_name(ANSWERS)))
    if not records:
        raise UserError(f"the sheets give no pair to train on ({told(records, left_out)}). Have more items judged")
    with new_file(file) as unfinished:
        unfinished.write_text("".join(jsonl(records)), encoding="utf-8")
    print(f"{file}: {told(records, left_out)}")


def _check_models(models: Sequence[str]) -> None:
    if len(models) < 2:
        raise UserError(f"`models` names {len(models)}. Give at least two models to compare")
    if twice := [one for one, other in combinations(models, 2) if one == other]:
        raise UserError(f"`models` names {twice[0]!r} twice. Leave one out")

"""The subcommand ``experts``: which experts does a model need, for which text and which questions?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_mixcn.arguments import Documents, Examples, Name
from lightning_mixcn.model.options import ModelOptions
from lightning_mixcn.studies.texts import StudyText

from .options import ChoiceOptions


def experts(
    src: str,
    *,
    out: Name,
    text: StudyText,
    choice: ChoiceOptions,
    tasks: Sequence[str] = (),
    mode: Literal["mask", "zero", "both", "saliency"] = "mask",
    limit: Documents | None = None,
    num_fewshot: Examples | None = None,
    data_dir: Name | None = None,
    model: ModelOptions,
) -> None:
    """Disable every expert in turn: what does each cost in bits per byte and accuracy? It resumes after a kill.

    The cost, for each mode, is about half of layers × experts forward passes over all tokens. Mixtral-8x7B (32 × 8, 26
    GFLOP a token) over 2 sources of 32,768 tokens: 65,536 × 256 × 26e9 / 2 = 2.2e17 FLOP, by arithmetic 18 minutes at
    200 TFLOP/s; OLMoE-1B-7B (16 × 64, 2.5 GFLOP) 8.6e16 FLOP and 7 minutes, Qwen3-30B-A3B (48 × 128, 6.9 GFLOP) 1.5e18
    FLOP and 2.1 hours. Mode saliency is one pass: 1.7e15, 1.6e14 and 4.5e14 FLOP. The cost is printed before work
    starts. A pass runs up to 8 × micro_batch_size rows together. In 16 bits, changes below 0.001 are rounding.

    `choose` writes which experts a training should adapt, after the study, or without `text` from what was measured
    before: no model is loaded then. Adapting only a language's experts: arXiv 2605.29714, see also 2605.18083.

    Args:
        src: Hugging Face folder or hub id, 4-bit folder of `mixcn quantize`, run folder, or PEFT adapter folder. To
            choose without `text`: folder of a study, or of a run with `ExpertLoadMonitor`, or its experts.csv, of which
            the last validation counts, or all training where there was none.
        out: Folder to make: experts.csv (change of bits per byte of each expert and source, with a 95 % bootstrap
            interval over documents, and saliency), differences.csv (between sources), accuracy.csv (change of accuracy
            of each expert and task), routing and co-activation and similarity of experts (.csv), pictures (.png),
            ranking.txt, experts.json (settings, base figures, cost), and with `choose` choice.json. Until it is whole,
            its parts are in the hidden folder .OUT.unfinished beside it. To choose without `text`, the JSON file to
            make.
        text: Texts of the study.
        choice: Choice of experts.
        tasks: Multiple choice of lm-evaluation-harness (extra `[eval]`), tasks or groups, e.g. ceval-valid: accuracy
            without each expert, judged by the harness. Prompts cost what as many tokens of text cost: C-Eval's 1,346
            questions of 700 tokens with 5 examples, 3.1e18 FLOP for each mode, 4.4 hours at 200 TFLOP/s. Choices that
            are one letter share their prompt; longer ones are a row each.
        mode: ``mask``, the expert cannot be chosen and another takes its place; ``zero``, its output is dropped, the
            others' weights stay; ``both``; ``saliency``, none is disabled: the mean over an expert's tokens of router
            weight × L2 norm of its output (REAP, arXiv 2510.13999), which the other modes write, too.
        limit: Documents of each task, the first ones; less than 1 is a share of them.
        num_fewshot: Examples in a prompt of a task; null is each task's own number.
        data_dir: Folder with the tasks' data, as `mixcn evaluate` takes it; null takes it from the hub.
        model: Loading of the model.

    Raises:
        ValueError: an option out of its range, text that cannot be used, or a task that is no multiple choice.
        FileNotFoundError: no such model, text or data.
        FileExistsError: the folder holds something else, or a study with other arguments.
        FloatingPointError: a likelihood is not finite.
    """
    table, file = Path(src).expanduser(), Path(out).expanduser()
    if choice.choose is None or text.text:
        from .study import study_experts

        study_experts(src, file, text, choice, mode, model, tasks, limit, num_fewshot, data_dir)
        table, file = file, file / "choice.json"
    if choice.choose is not None:
        from .choose import write_choice

        write_choice(table, choice, file)

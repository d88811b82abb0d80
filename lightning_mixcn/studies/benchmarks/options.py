"""The measurements of an evaluation. Imports no torch: it is part of the help of `mixcn evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from lightning_mixcn.arguments import Between, Documents, Examples, Name, check_arguments

Prompts = Annotated[int, Between(1, 10**6)]
Labels = Annotated[int, Between(2, 26, "(labels are letters)")]
Shots = Annotated[int, Between(1, 1000)]
Characters = Annotated[int, Between(4, 10**5)]


@dataclass(frozen=True)
class EvaluationOptions:
    """Tasks, prompts and probes of an evaluation.

    Args:
        tasks: Tasks or groups of the harness (`lm_eval ls tasks` lists them), e.g. ceval-valid,cmmlu,mmlu,hellaswag, or
            groups by language such as chinese,english (docs/studies/evaluate.md lists them); none beside a probe.
            The cost, for each model, is about one forward pass over every prompt of multiple choice, and one for each
            token of a generated answer. Mixtral-8x7B (26 GFLOP a token) on MMLU, 14,042 questions of 700 tokens with 5
            examples: 2.6e17 FLOP, by arithmetic 21 minutes at 200 TFLOP/s. Finding the tasks takes 10 to 20 seconds.
        num_fewshot: Examples in a prompt; null is each task's own number. Tasks that are defined with 0 keep it.
        limit: Documents of each task, the first ones; less than 1 is a share of them. For trying out only.
        apply_chat_template: Write prompts as conversations with the chat template of the model's tokenizer.
        batch_size: Prompts in a forward pass, or auto: as many as memory holds.
        data_dir: Folder with the data, instead of the hub: datasets as OWNER/NAME/, or what the authors of C-Eval,
            CMMLU and MMLU (.zip or folder), GSM8K, HellaSwag and XCOPA's Chinese (.jsonl) publish. Nothing is fetched
            then.
        eos_probe: Texts, each as name=PATH: how likely EOS is after a line break inside a document. A model that
            learned from single lines stops there, and reasons over one line only.
        eos_probe_tokens: Tokens of each text; the cost is one forward pass.
        few_shot_probe: Texts, each as name=PATH: accuracy of labels that only the prompt tells, without any data
            set. Adaptation can lose it where bits per byte stay good.
        few_shot_prompts: Prompts of each text; the cost is two forward passes over each.
        few_shot_labels: Documents in a prompt, each with a label of its own; chance is one in so many.
        few_shot_shots: Snippets that a prompt shows of each document.
        few_shot_characters: Largest number of characters of a snippet.

    Raises:
        ValueError: a number is out of its range.
    """

    tasks: Sequence[Name] = ()
    num_fewshot: Examples | None = None
    limit: Documents | None = None
    apply_chat_template: bool = False
    batch_size: Annotated[int, Between(1, 2**16, "(or auto)")] | Literal["auto"] = 8
    data_dir: Name | None = None
    eos_probe: Sequence[str] = ()
    eos_probe_tokens: Annotated[int, Between(2, 10**12)] = 65_536
    few_shot_probe: Sequence[str] = ()
    few_shot_prompts: Prompts = 200
    few_shot_labels: Labels = 2
    few_shot_shots: Shots = 4
    few_shot_characters: Characters = 32

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_arguments(EvaluationOptions, vars(self))

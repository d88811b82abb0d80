"""How the model does on benchmarks, while it trains."""

from pathlib import Path
from typing import Annotated, Any

from lightning.pytorch import LightningModule, Trainer

from lightning_mixcn.arguments import Between, Documents, Examples, Filled, Name, Steps, check_arguments
from lightning_mixcn.errors import UserError
from lightning_mixcn.model.reference import evaluating
from lightning_mixcn.modules import CausalLMModule
from lightning_mixcn.studies.task_files import BenchmarkFiles
from lightning_mixcn.studies.task_scores import (
    TaskScores,
    group_metrics,
    metric_keys,
    run_task,
)
from lightning_mixcn.studies.tasks import Benchmarks, load_benchmarks, split_names

from ..host import StepRecords, causal_lm
from .periodic import PeriodicEvaluation
from .samples import run_tokenizer


class BenchmarkEval(PeriodicEvaluation):
    """Runs tasks of lm-evaluation-harness before the first step, every so often and at the end.

    Logs ``benchmarks/<task>/<metric>`` (of groups, too, where the harness aggregates them; of its named answer filters
    as ``benchmarks/<task>/<metric>/<filter>``), and appends all figures with their standard errors to
    ``benchmarks.jsonl`` in the run's folder, one line an evaluation. All ranks work on the same prompts, and share the
    rows of a batch. Needs the extra ``eval``.

    Args:
        tasks: Tasks or groups of the harness, e.g. ceval-valid, hellaswag.
        every_n_steps: Optimizer steps between evaluations, which also come before the first step and after the last;
            null evaluates then only.
        num_fewshot: Examples in a prompt; null is each task's own number.
        limit: Documents of each task, the first ones; less than 1 is a share of them, null takes all. 100 keep an
            evaluation short, with a standard error of at most 0.05 in accuracy.
        apply_chat_template: Write prompts as conversations with the chat template of the model's tokenizer.
        batch_size: Prompts in a forward pass, over all ranks.
        data_dir: Folder with the data, as `mixcn evaluate` takes it; null takes it from the hub.
    """

    run_files = ("benchmarks.jsonl",)

    def __init__(
        self,
        tasks: Annotated[list[Name], Filled("at least one task")],
        every_n_steps: Steps | None = None,
        num_fewshot: Examples | None = None,
        limit: Documents | None = 100,
        apply_chat_template: bool = False,
        batch_size: Annotated[int, Between(1, 2**16)] = 8,
        data_dir: Name | None = None,
    ) -> None:
        check_arguments(BenchmarkEval, locals())
        super().__init__(every_n_steps)
        self.tasks, self.num_fewshot, self.limit = split_names(tasks), num_fewshot, limit
        self.apply_chat_template, self.batch_size, self.data_dir = apply_chat_template, batch_size, data_dir
        self.scores: dict[str, TaskScores] = {}
        self._benchmarks: Benchmarks | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the tasks and their data.

        Raises:
            ValueError: another kind of module, no such task, or lm-evaluation-harness is not installed.
            FileNotFoundError: a task's data is not there.
        """
        module = causal_lm(self, pl_module)
        if stage != "fit":
            return
        files = BenchmarkFiles(self.data_dir) if self.data_dir else None
        self._benchmarks = load_benchmarks(self.tasks, num_fewshot=self.num_fewshot, files=files)
        if self.apply_chat_template and run_tokenizer(trainer, module).hf.chat_template is None:
            raise UserError(
                "`apply_chat_template`, but the model's tokenizer has no chat template. Put a chat_template.jinja into "
                "its folder, or leave the option out"
            )

    def evaluate(self, trainer: Trainer, module: CausalLMModule) -> None:
        """Run on every rank; log on rank zero."""
        from lightning_mixcn.studies.harness import HarnessModel

        benchmarks = self._benchmarks
        assert module.model is not None
        assert benchmarks is not None
        with evaluating(module.model):
            lm = HarnessModel(module.model, run_tokenizer(trainer, module), self.batch_size)
            options: dict[str, Any] = {"limit": self.limit, "apply_chat_template": self.apply_chat_template}
            self.scores = {name: run_task(lm, benchmarks, name, **options)[0] for name in benchmarks.tasks}
        if not trainer.is_global_zero:
            return
        figures = {name: scores["metrics"] for name, scores in self.scores.items()}
        figures |= group_metrics(benchmarks, self.scores)
        values = {
            "/".join(["benchmarks", name, metric, *([] if answer == "none" else [answer])]): metrics[
                f"{metric},{answer}"
            ]
            for name, metrics in figures.items()
            for metric, answer in metric_keys(metrics)
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self.records(trainer).append(trainer.global_step, [{"tasks": figures}])

    def records(self, trainer: Trainer) -> StepRecords:
        """Return the records in ``benchmarks.jsonl``."""
        return StepRecords(Path(trainer.default_root_dir, "benchmarks.jsonl"))

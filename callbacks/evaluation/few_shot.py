"""How well the model learns from its prompt, while it trains."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lightning_mixcn.arguments import RowTokens, Seed, Steps, check_arguments
from lightning_mixcn.model.inference.prefill import default_chunk
from lightning_mixcn.modules import CausalLMModule
from lightning_mixcn.studies.benchmarks.few_shot_probe import (
    FewShotFigures,
    FewShotOptions,
    make_prompts,
    probe_few_shot,
)
from lightning_mixcn.studies.benchmarks.options import Characters, Labels, Prompts, Shots
from lightning_mixcn.text import DocumentSet, Source, parse_sources

from ..host import StepRecords, causal_lm
from .periodic import PeriodicEvaluation, evaluation_documents
from .samples import run_tokenizer


class FewShotProbe(PeriodicEvaluation):
    """Asks for labels that only the prompt tells, before the first step, every so often and at the end.

    A prompt shows snippets of held-out documents, each with the label of its document, a letter that is dealt anew for
    each prompt. Logs the share of right answers as ``val/few_shot/<source>/seen``, where the snippet to label is one of
    the prompt's, and ``val/few_shot/<source>/unseen``, where it is another one of the same documents; appends both with
    95 % intervals to ``few_shot.jsonl`` in the run's folder, one line an evaluation. The prompts are the same at each
    evaluation, on any number of ranks.

    Args:
        sources: Texts; null takes the validation documents of the data module.
        every_n_steps: Optimizer steps between evaluations, which also come before the first step and after the last;
            null evaluates then only.
        prompts: Prompts of each source; 200 give an interval of at most 0.07 to either side.
        labels: Documents in a prompt, each with a label of its own; chance is one in so many.
        shots: Snippets that a prompt shows of each document.
        characters: Largest number of characters of a snippet.
        chunk: Tokens of a forward pass; null is 4,096 on a GPU and 512 on the CPU.
        seed: Seed of the prompts; the random numbers of training are left alone.
    """

    run_files = ("few_shot.jsonl",)

    def __init__(
        self,
        sources: list[Source] | None = None,
        every_n_steps: Steps | None = None,
        prompts: Prompts = 200,
        labels: Labels = 2,
        shots: Shots = 4,
        characters: Characters = 32,
        chunk: RowTokens | None = None,
        seed: Seed = 0,
    ) -> None:
        check_arguments(FewShotProbe, locals())
        super().__init__(every_n_steps)
        self.sources = None if sources is None else parse_sources(sources, "sources", Source)
        self.options, self.chunk = FewShotOptions(prompts, labels, shots, characters, seed), chunk
        self.figures: dict[str, FewShotFigures] = {}
        self._sets: list[DocumentSet] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the documents, and refuse those that give no prompts.

        Raises:
            FileNotFoundError: a source's path matches no file.
            ValueError: another kind of module, a data module without documents, or too few documents.
        """
        causal_lm(self, pl_module)
        if stage == "fit":
            self._sets = evaluation_documents(self, trainer, self.sources)
            for documents in self._sets:
                make_prompts(documents, self.options)

    def evaluate(self, trainer: Trainer, module: CausalLMModule) -> None:
        """Ask on every rank; log on rank zero."""
        assert module.model is not None
        tokenizer, chunk = run_tokenizer(trainer, module), self.chunk or default_chunk(module.device)
        self.figures = {
            documents.name: probe_few_shot(
                module.model, tokenizer, documents, self.options, chunk,
                rank=trainer.global_rank, num_ranks=trainer.world_size,
            )
            for documents in self._sets
        }  # fmt: skip
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        values = {
            f"val/few_shot/{source}/{kind}": found["accuracy"]
            for source, kinds in self.figures.items()
            for kind, found in kinds.items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        written = {
            source: {
                kind: {name: value for name, value in found.items() if name != "right"} for kind, found in kinds.items()
            }
            for source, kinds in self.figures.items()
        }
        self.records(trainer).append(step, [{"prompts": self.options.prompts, "sources": written}])

    def records(self, trainer: Trainer) -> StepRecords:
        """Return the records in ``few_shot.jsonl``."""
        return StepRecords(Path(trainer.default_root_dir, "few_shot.jsonl"))

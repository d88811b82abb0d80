"""How the model answers, while it is tuned: whether its answers end, repeat themselves, and how long they are."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_mixcn.data import InstructDataModule
from lightning_mixcn.metrics import AnswerFigures, answer_figures
from lightning_mixcn.modules import CausalLMModule
from lightning_mixcn.text import Turn

from .sampling import Sampling


class SampleAnswers(Sampling):
    """Answers held-out questions before the first step, every so often and at the end.

    Logs ``answers/eos_rate`` (share of answers that the model ends itself within ``max_new_tokens``),
    ``answers/repetition_rate`` (share of 4-grams of tokens that an answer has had before) and
    ``answers/length_tokens`` (mean); shows the answers in TensorBoard, and appends them to ``answers.jsonl`` in the
    run's folder, one line a question: step, question, answer, whether it ended.

    Args:
        questions: Held-out conversations that are answered, the first ones of each source in turn; the model is given
            all turns before the last answer.
        every_n_steps: Optimizer steps between samples.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 is greedy, which makes samples of different steps comparable; else the softmax temperature.
        repetition_penalty: Makes tokens of the conversation less likely if more than 1, which is none.
        seed: Of the random numbers where the temperature is not 0; those of training are left alone.
    """

    def __init__(
        self,
        questions: int = 16,
        every_n_steps: int = 500,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> None:
        if questions < 1:
            raise ValueError(f"`questions={questions}`: expected at least 1")
        super().__init__(
            every_n_steps=every_n_steps,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            seed=seed,
            file="answers.jsonl",
        )
        self.questions = questions
        self.figures: AnswerFigures | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other data than conversations. Raises: ValueError, too, if no conversation is held out."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not any(_data(trainer).evaluation_conversations("val")):
            raise ValueError(
                "SampleAnswers needs held-out conversations: set data.init_args.val_fraction, e.g. 0.02, or val_sources"
            )

    def sample(self, trainer: Trainer, module: CausalLMModule) -> None:
        """Answer the questions."""
        data = _data(trainer)
        template, tokenizer = data.template, data.tokenizer
        of_sources = data.evaluation_conversations("val")
        deepest = max(map(len, of_sources))
        in_turn = [part[place] for place in range(deepest) for part in of_sources if place < len(part)]
        asked, prompts = list[list[Turn]](), list[list[int]]()
        for turns in in_turn:
            if len(asked) == self.questions:
                break
            try:
                prompts.append(template.encode_prompt(turns[:-1], tokenizer))
            except ValueError:
                if data.on_bad_record == "error":
                    raise
            else:  # what the template refuses is left out here, too
                asked.append(turns[:-1])
        stop_ids = template.stop_ids(tokenizer)
        answers = self.generate(module, prompts, stop_ids)
        self.figures = answer_figures(answers, stop_ids)
        values: dict[str, Any] = {f"answers/{name}": value for name, value in self.figures.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        records, shown = [], {}
        for number, (turns, ids) in enumerate(zip(asked, answers, strict=True)):
            text, ended = tokenizer.decode(ids), ids[-1] in stop_ids
            records.append({"question": turns[-1].content, "answer": text.strip(), "ended": ended})
            shown[f"answers/{number}"] = f"**{turns[-1].content}**\n\n{text}" + ("" if ended else " …")
        self.write(trainer, records, shown)


def _data(trainer: Trainer) -> InstructDataModule:
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(data, InstructDataModule):
        raise ValueError(
            f"SampleAnswers needs an InstructDataModule, got {type(data).__name__}. Use SampleText for plain text"
        )
    return data

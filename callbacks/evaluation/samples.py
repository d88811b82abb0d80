"""Text that the model writes while it trains: when, how, and where it is kept."""

import html
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mixcn.arguments import Between, Filled, Name, NewTokens, Seed, Steps, check_arguments
from lightning_mixcn.data import InstructDataModule, PreferenceDataModule
from lightning_mixcn.errors import UserError
from lightning_mixcn.metrics import AnswerFigures, answer_figures
from lightning_mixcn.modules import CausalLMModule
from lightning_mixcn.text import TextTokenizer, Turn, load_tokenizer

from ..host import StepRecords, causal_lm, log_texts, plain_name

Temperature = Annotated[float, Between(0, 100, "(0 for greedy)")]
Penalty = Annotated[float, Between(0, 100, "(1 for none)", excluded=(0,))]


class PeriodicSampling(Callback):
    """Calls `sample` before the first step, every so often and at the end; what to sample is the subclass's.

    Args:
        every_n_steps: Optimizer steps between samples.
        max_new_tokens: Length of a sample in tokens.
        temperature: 0 is greedy, else the softmax temperature.
        repetition_penalty: Factor that makes tokens that occurred before less likely; 1 is none.
        seed: Seed of the random numbers where the temperature is not 0; those of training are left alone.
        file: Name of the JSON Lines file in the run's folder.
    """

    def __init__(
        self,
        *,
        every_n_steps: Steps,
        max_new_tokens: NewTokens,
        temperature: Temperature,
        seed: Seed,
        file: Name,
        repetition_penalty: Penalty = 1.0,
    ) -> None:
        check_arguments(PeriodicSampling, locals())
        self.every_n_steps = every_n_steps
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.repetition_penalty = repetition_penalty
        self.seed = seed
        self._file = plain_name("file", file, ["samples.jsonl", "answers.jsonl"])
        self.run_files = (file,)
        self._sampled_at: int | None = None

    def sample(self, trainer: Trainer, module: CausalLMModule) -> None:
        """Sample and log. Every rank comes here, since a sharded model needs all of them."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module."""
        causal_lm(self, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample the start of a run; a resumed one goes on."""
        if trainer.is_global_zero:
            self._records(trainer).start(trainer.global_step)
        if trainer.global_step == 0:
            self._sample(trainer, pl_module)
        self._sampled_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample where a step is a multiple of ``every_n_steps``."""
        # Micro-batches of the next step still see this step's number.
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._sampled_at:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample the last step."""
        if trainer.global_step != self._sampled_at:
            self._sample(trainer, pl_module)

    def generate(
        self, module: CausalLMModule, prompts: Sequence[Sequence[int]], stop_ids: Collection[int]
    ) -> list[list[int]]:
        """Continue prompts, all at once.

        Args:
            module: The module.
            prompts: Token ids of each, at least one token.
            stop_ids: Tokens that end a continuation.

        Returns:
            The tokens of each continuation, the one that ended it included.
        """
        width = max(map(len, prompts))
        # The penalty sees the padding, too: a token of the prompt itself changes nothing.
        rows = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        chosen = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        model: Any = module.model
        with generating(module, self.seed):
            generated = model.generate(
                input_ids=torch.tensor(rows, device=module.device),
                attention_mask=torch.tensor(mask, device=module.device),
                max_new_tokens=self.max_new_tokens,
                eos_token_id=sorted(stop_ids),
                pad_token_id=min(stop_ids),
                repetition_penalty=self.repetition_penalty,
                **chosen,
            )
        return [_up_to_stop(row, stop_ids) for row in generated[:, width:].tolist()]

    def write(self, trainer: Trainer, records: Sequence[dict[str, Any]]) -> None:
        """Append records to the run's file, and show each beside those of other steps as a card, on rank zero.

        Cards are ``samples/0`` and so on, by the name of the file and the place of the record.

        Args:
            trainer: Lightning's.
            records: Values of each line, beside the step: the prompt first, then what the model wrote; ``ended`` is
                whether it ended the text itself.
        """
        if not trainer.is_global_zero:
            return
        kept = self._records(trainer)
        kept.append(trainer.global_step, records)
        by_step: dict[int, list[dict[str, Any]]] = {}
        for record in kept.read():
            by_step.setdefault(record.pop("step"), []).append(record)
        name = Path(self._file).stem
        cards = {f"{name}/{number}": _card(by_step, number) for number in range(len(records))}
        log_texts(trainer, cards, trainer.global_step)

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sampled_at = trainer.global_step
        self.sample(trainer, causal_lm(self, pl_module))

    def _records(self, trainer: Trainer) -> StepRecords:
        return StepRecords(Path(trainer.default_root_dir, self._file))


_COLUMNS = 4  # of a card: the first step, and the newest ones


def _card(by_step: Mapping[int, Sequence[Mapping[str, Any]]], number: int) -> str:
    """Return a prompt, and a table of what came of it: the first step and the newest ones side by side."""
    *_, newest = by_step.values()
    of_prompt, of_text, *_ = newest[number]
    prompt = newest[number][of_prompt]
    columns: list[tuple[int, str]] = []
    for step, records in by_step.items():
        record = records[number] if number < len(records) else {}
        if record.get(of_prompt) == prompt:  # a resumed run may ask something else
            columns.append((step, _cell(str(record.get(of_text, ""))) + ("" if record.get("ended", True) else " …")))
    shown = columns[:1] + columns[1:][1 - _COLUMNS :]
    rows = [[f"step {step:,}" for step, _ in shown], ["---"] * len(shown), [text for _, text in shown]]
    return f"**{_cell(prompt)}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(text: str) -> str:
    """Write a text as it is, in one cell of a table in Markdown."""
    escaped = html.escape(text.strip(), quote=False).replace("|", "\\|")
    return "<br>".join(escaped.splitlines())


def run_tokenizer(trainer: Trainer, module: CausalLMModule) -> TextTokenizer:
    """Return the data's tokenizer, or the one that the module names."""
    given = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    return given if isinstance(given, TextTokenizer) else load_tokenizer(module.tokenizer_path)


@contextmanager
def generating(module: CausalLMModule, seed: int) -> Iterator[None]:
    """Switch to evaluation mode, with random numbers of its own; restore each submodule's mode afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    devices = [module.device] if str(module.device).startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        module.eval()
        try:
            yield
        finally:
            for child, training in modes:
                child.training = training


def _up_to_stop(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0] + 1] if ends else ids


class SampleAnswers(PeriodicSampling):
    """Answers held-out questions before the first step, every so often and at the end.

    Logs ``answers/eos_rate`` (share of answers that the model ends itself within ``max_new_tokens``),
    ``answers/repetition_rate`` (share of 4-grams of tokens that an answer has had before) and
    ``answers/length_tokens`` (mean); shows the answers to a question side by side over the steps, and appends them to
    ``answers.jsonl`` in the run's folder, one line a question: step, question, answer, whether it ended.

    Args:
        questions: Held-out conversations that are answered, the first ones of each source in turn; the model is given
            all turns before the last answer.
        every_n_steps: Optimizer steps between samples.
        max_new_tokens: Largest number of tokens of an answer.
        temperature: 0 is greedy, which makes samples of different steps comparable; else the softmax temperature.
        repetition_penalty: Factor that makes tokens of the conversation less likely; 1 is none.
        seed: Seed of the random numbers where the temperature is not 0; those of training are left alone.
    """

    def __init__(
        self,
        questions: Annotated[int, Between(1, 10**6)] = 16,
        every_n_steps: Steps = 500,
        max_new_tokens: NewTokens = 256,
        temperature: Temperature = 0.0,
        repetition_penalty: Penalty = 1.0,
        seed: Seed = 0,
    ) -> None:
        check_arguments(SampleAnswers, locals())
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
            raise UserError(
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
        records = []
        for turns, ids in zip(asked, answers, strict=True):
            text, ended = tokenizer.decode(ids), ids[-1] in stop_ids
            records.append({"question": turns[-1].content, "answer": text.strip(), "ended": ended})
        self.write(trainer, records)


def _data(trainer: Trainer) -> InstructDataModule | PreferenceDataModule:
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(data, InstructDataModule | PreferenceDataModule):
        raise UserError(
            f"SampleAnswers needs an InstructDataModule or a PreferenceDataModule, got {type(data).__name__}. Use "
            "SampleText for plain text"
        )
    return data


class SampleText(PeriodicSampling):
    """Continues prompts before the first step, every so often and at the end; shows them side by side over the steps.

    They are also appended to ``samples.jsonl`` in the run's folder, one line a prompt: step, prompt, continuation.

    Args:
        prompts: Texts to continue.
        every_n_steps: Optimizer steps between samples.
        max_new_tokens: Length of a continuation in tokens.
        temperature: 0 is greedy, which makes samples of different steps comparable; else the softmax temperature.
        seed: Seed of the random numbers where the temperature is not 0; those of training are left alone.
    """

    def __init__(
        self,
        prompts: Annotated[list[str], Filled("at least one text to continue")],
        every_n_steps: Steps = 500,
        max_new_tokens: NewTokens = 64,
        temperature: Temperature = 0.0,
        seed: Seed = 0,
    ) -> None:
        check_arguments(SampleText, locals())
        super().__init__(
            every_n_steps=every_n_steps,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            file="samples.jsonl",
        )
        self.prompts = prompts

    def sample(self, trainer: Trainer, module: CausalLMModule) -> None:
        """Continue every prompt."""
        tokenizer = run_tokenizer(trainer, module)
        # An empty prompt needs a token to go on from.
        encoded = tokenizer.encode_batch(self.prompts)
        rows = [[*tokenizer.begin_ids, *ids] or [tokenizer.bos_id] for ids in encoded]
        texts = [tokenizer.decode(ids) for ids in self.generate(module, rows, [tokenizer.eos_id])]
        pairs = zip(self.prompts, texts, strict=True)
        self.write(trainer, [{"prompt": prompt, "continuation": text} for prompt, text in pairs])

"""What the model writes, while it trains."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mixcn.modules import CausalLMModule
from lightning_mixcn.text import TextTokenizer, load_tokenizer

from .host import causal_lm


class SampleText(Callback):
    """Continues prompts before the first step, every so often and at the end; shows them in TensorBoard.

    They are also appended to ``samples.jsonl`` in the run's folder, one line a prompt: step, prompt, continuation.

    Args:
        prompts: Texts to continue.
        every_n_steps: Optimizer steps between samples.
        max_new_tokens: Length of a continuation in tokens.
        temperature: 0 is greedy, which makes samples of different steps comparable; else the softmax temperature.
        seed: Of the random numbers where the temperature is not 0; those of training are left alone.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_steps: int = 500,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not prompts:
            raise ValueError("`prompts=[]`: expected at least one text to continue")
        for name, value in (("every_n_steps", every_n_steps), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"`{name}={value}`: expected at least 1")
        if temperature < 0:
            raise ValueError(f"`temperature={temperature}`: expected 0 for greedy, or more")
        self.prompts = prompts
        self.every_n_steps = every_n_steps
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self._sampled_at: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module."""
        causal_lm(self, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample the start of a run; a resumed one goes on."""
        if trainer.global_step == 0:
            if trainer.is_global_zero:
                _file(trainer).unlink(missing_ok=True)
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

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate on every rank, since a sharded model needs all of them; write on rank zero."""
        self._sampled_at = trainer.global_step
        module, data = causal_lm(self, pl_module), getattr(trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None) or load_tokenizer(module.tokenizer_path)
        with _generating(module, self.seed):
            texts = [self._continue(module, tokenizer, prompt) for prompt in self.prompts]
        if trainer.is_global_zero:
            _append(_file(trainer), trainer.global_step, self.prompts, texts)
            for logger in trainer.loggers:
                if add_text := getattr(getattr(logger, "experiment", None), "add_text", None):
                    for number, (prompt, text) in enumerate(zip(self.prompts, texts, strict=True)):
                        add_text(f"samples/{number}", f"**{prompt}**{text}", trainer.global_step)

    def _continue(self, module: CausalLMModule, tokenizer: TextTokenizer, prompt: str) -> str:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode_batch([prompt])[0]]], device=module.device)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        model: Any = module.model
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
            **sampling,
        )
        return tokenizer.decode(generated[0, ids.shape[1] :].tolist())


@contextmanager
def _generating(module: CausalLMModule, seed: int) -> Iterator[None]:
    """Evaluation mode, and random numbers of its own; afterwards each submodule's mode is what it was."""
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


def _file(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir, "samples.jsonl")


def _append(path: Path, step: int, prompts: list[str], texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = (
        {"step": step, "prompt": prompt, "continuation": text} for prompt, text in zip(prompts, texts, strict=True)
    )
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

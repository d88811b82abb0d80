"""What the model writes, while it trains."""

from lightning.pytorch import Trainer

from lightning_mixcn.modules import CausalLMModule

from .sampling import Sampling, tokenizer_of


class SampleText(Sampling):
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
        tokenizer = tokenizer_of(trainer, module)
        rows = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(self.prompts)]
        texts = [tokenizer.decode(ids) for ids in self.generate(module, rows, [tokenizer.eos_id])]
        pairs = list(zip(self.prompts, texts, strict=True))
        records = [{"prompt": prompt, "continuation": text} for prompt, text in pairs]
        shown = {f"samples/{number}": f"**{prompt}**{text}" for number, (prompt, text) in enumerate(pairs)}
        self.write(trainer, records, shown)

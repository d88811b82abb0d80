"""The subcommand ``chat``: talk to a model in the terminal, or feed it a file of questions."""

from lightning_mixcn.arguments import Name, Seed
from lightning_mixcn.model.inference.sampling import Sampling
from lightning_mixcn.model.options import ModelOptions


def chat(
    src: str,
    *,
    system: str | None = None,
    template: Name | None = None,
    json: bool = False,
    sampling: Sampling,
    seed: Seed = 0,
    model: ModelOptions,
) -> None:
    """Talk to a model in the terminal, where /help lists the commands; from a pipe, every line is a question.

    On a CPU, 4-bit weights are held twice where memory allows: answers then come two to three times as fast.

    Args:
        src: Hugging Face folder or hub id, 4-bit folder of `mixcn quantize`, run folder, or PEFT adapter folder.
        system: System prompt.
        template: ``mixtral``, ``tokenizer`` for the chat template of the model's tokenizer, or a Jinja file. Null is
            the one that the model carries, which for a run, its adapter and its exports is the one it was trained with;
            ``mixtral`` where it carries none.
        json: Read and write JSON Lines. A question is a string, or an object with ``question`` and, to begin a new
            conversation with it, ``reset: true``. Its answer is a line with the object's own keys and ``answer``,
            ``tokens``, and ``finish``: ``stop``, or ``length`` where the model was cut off.
        sampling: Choice of tokens.
        seed: Seed of the random numbers.
        model: Loading of the model.

    Raises:
        ValueError: an option out of its range, or, from a pipe, a question that cannot be asked.
        FileNotFoundError: no such model or template.
    """
    from .conversation import talk_with

    talk_with(src, system, template, sampling, seed, model, as_json=json)

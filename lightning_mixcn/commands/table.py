"""List the subcommands: their help, and the module whose function each one calls."""

from typing import Any

# Each with the line that `mixcn --help` shows.
COMMANDS = {
    "init": "write the first YAML of a run: one that fits your base, GPU and texts",
    "fit": "train from a YAML configuration; --ckpt_path last resumes",
    "validate": "likelihood of every source's held-out documents, into validate.json",
    "test": "likelihood of every test source, into test.json",
    "predict": "nats, bytes and tokens of every document, into predictions.jsonl",
    "upcycle": "make a mixture of experts of a dense Llama, Mistral or Qwen3",
    "quantize": "write a 4-bit model folder, which loads without quantising again",
    "export": "write a merged model or an adapter for transformers, PEFT, vLLM and llama.cpp",
    "report": "one HTML page of a run: what was trained on what, curves, figures, samples, versions",
    "push": "put a run's adapter or an export on the Hugging Face hub, with its model card",
    "chat": "talk to a model in the terminal, or pipe questions into it",
    "evaluate": "benchmarks of lm-evaluation-harness, a base beside its adapted self",
    "experts": "disable each expert in turn: what it costs in bits per byte, by source",
    "vocab": "train pieces of another language, merge them into a tokenizer, count tokens",
    "compare": "run a recipe's arms on the same bytes of text: table and figure",
    "preference": "blind sheets of models' answers for judges; win rates and pairs to train on from filled-in ones",
    "quantization": "compare formats of the weights: bytes, bits per weight, bits per byte",
    "data": "find and remove duplicates, noise and benchmark questions in texts to train on",
    "configs": "list the configurations of this package, print one, or write it to a file",
    "help": "explain a command or a class by its name; list callbacks, strategies, optimizers",
}

FUNCTIONS = {
    "upcycle": "lightning_mixcn.model.convert.upcycle",
    "quantize": "lightning_mixcn.model.convert.quantize",
    "export": "lightning_mixcn.model.export.command",
    "report": "lightning_mixcn.sharing.command",
    "push": "lightning_mixcn.sharing.command",
    "chat": "lightning_mixcn.cli.chat",
    "evaluate": "lightning_mixcn.studies.benchmarks.evaluate",
    "experts": "lightning_mixcn.studies.experts.command",
    "vocab": "lightning_mixcn.studies.vocabulary.command",
    "compare": "lightning_mixcn.studies.comparison.command",
    "preference": "lightning_mixcn.studies.preference.command",
    "quantization": "lightning_mixcn.studies.quantization.command",
    "data": "lightning_mixcn.studies.hygiene.command",
    "init": "lightning_mixcn.cli.init",
    "configs": "lightning_mixcn.cli.configs",
    "help": "lightning_mixcn.cli.help",
}


# Of a module that is several functions: `mixcn vocab train` and so on.
NESTED = {"vocab": ("train", "merge", "report"), "preference": ("sheet", "score", "pairs"), "data": ("report", "clean")}

# What `mixcn` gives Lightning's Trainer in place of its own defaults.
TRAINER_DEFAULTS: dict[str, Any] = {
    # The compute dtype is the model's; the data module shares rows out between ranks itself.
    "precision": "32-true",
    "use_distributed_sampler": False,
    # Steps take seconds, and the module waits for each one's loss anyway.
    "log_every_n_steps": 1,
    # The stream has no end of Lightning's kind: a run is as long as its steps, see `settle_epochs`.
    "max_epochs": -1,
}

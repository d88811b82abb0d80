"""A program of its own, since vLLM starts processes: log-probabilities of a prompt's tokens but the first, as JSON."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Arguments: the model's folder, the prompt's token ids as JSON, and the file to write."""
    package: Any = importlib.import_module("vllm")
    folder, ids, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    model = package.LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=64)
    sampling = package.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (answer,) = model.generate({"prompt_token_ids": ids}, sampling)
    pairs = zip(answer.prompt_logprobs[1:], ids[1:], strict=True)
    out.write_text(json.dumps([places[token].logprob for places, token in pairs]), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Stage 5: tokens per second of generation, on each path of the expert block."""

from typing import Any

import generate
import record
from gpu_stages.running import Figures
from gpu_stages.settings import Settings, with_path

from lightning_mixcn.model.experts.path import PATHS
from lightning_mixcn.model.inference.generation import prepare_for_generation

BATCHES = (1, 8)
PROMPT_TOKENS, NEW_TOKENS = 128, 64
_ROUNDS = 2


def run(settings: Settings, figures: Figures) -> None:
    """Measure what `mixcn chat` takes first, then each path; a path that raises loses only its own figures."""
    model = settings.model(None).eval()
    prepare_for_generation(model)
    prompt, new = settings.tokens(PROMPT_TOKENS), settings.tokens(NEW_TOKENS)
    decode = generate.decoder(model, settings.device, prompt, new)
    read = generate.memory(settings.config, settings.device, new)
    figures |= {"prompt_tokens": prompt, "new_tokens": new, "cases": []}
    for batch in BATCHES:
        limit = record.spread([read(batch) for _ in range(1 + settings.rounds(_ROUNDS))][1:])
        for path in (None, *PATHS):
            with_path(path)
            found: dict[str, Any] = {"batch": batch, "path": path or "as shipped"}
            figures["cases"].append(found)
            try:
                seconds = [decode(batch) for _ in range(1 + settings.rounds(_ROUNDS))][1:]
            except Exception as error:  # the next path may do
                found["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            else:
                needed = generate.bytes_per_step(settings.config, batch) * new
                found["tokens_per_second"] = record.spread([batch * new / value for value in seconds])
                found["needed_gb_per_second"] = record.spread([needed / value / 1e9 for value in seconds])
                found["share_of_limit"] = limit["median"] / record.spread(seconds)["median"]
            figures.save()
            said = f"{found['tokens_per_second']['median']:.1f} tokens/s" if "error" not in found else found["error"]
            print(f"  {batch} rows, {found['path']}: {said}", flush=True)

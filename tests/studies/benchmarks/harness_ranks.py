"""What each of several ranks does in the test of the harness's model."""

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from lightning_mixcn.model import load_mixtral, shard_model
from lightning_mixcn.studies.harness import HarnessModel
from lightning_mixcn.text import load_tokenizer

REQUESTS = [
    ("Once upon a time", " there was"),
    ("a", " b"),
    ("The cat", " sat on the mat"),
    ("x y z", " w"),
    ("q", "r"),
]


def answers_of(folder: str, sharded: bool) -> tuple[list[Any], list[str], int]:
    """Log-likelihoods and continuations, and how many forward passes they took."""
    from lm_eval.api.instance import Instance

    shard = None
    if sharded:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        shard = lambda model: shard_model(model, mesh)  # noqa: E731  # one line is all there is to it
    model = load_mixtral(folder, quantization="nf4", dtype="float32", shard=shard).eval()
    forwards = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    lm = HarnessModel(model, load_tokenizer(folder), batch_size=3)
    asked = [Instance("loglikelihood", {}, request, i) for i, request in enumerate(REQUESTS)]
    likelihoods = lm.loglikelihood(asked, disable_tqdm=True)
    options = {"until": ["#"], "max_gen_toks": 6}
    generated = [Instance("generate_until", {}, (text, options), i) for i, (text, _) in enumerate(REQUESTS)]
    return likelihoods, lm.generate_until(generated, disable_tqdm=True), len(forwards)

"""Models of the harness that know all answers, or none."""

import random
from collections.abc import Callable
from typing import Any

from tests.studies.benchmark_data import harness


def fake_model(likelihood: Callable[[Any], float]) -> Any:
    """Make a model whose log-likelihood of a continuation is what a function says of the request."""
    harness()
    from lm_eval.api.model import LM

    class Fake(LM):  # type: ignore[misc]  # published without types
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return [(likelihood(request), False) for request in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

    return Fake()


def oracle() -> Any:
    """Find the answer that the document of a request holds likeliest."""

    def likelihood(request: Any) -> float:
        doc, choice = request.doc, request.args[1].strip()
        if "endings" in doc:
            return 0.0 if request.idx == int(doc["label"]) else -1e4
        answer = doc.get("answer", doc.get("Answer"))
        return 0.0 if choice == ("ABCD"[answer] if isinstance(answer, int) else answer) else -1.0

    return fake_model(likelihood)


def chance(seed: int = 0) -> Any:
    """Draws."""
    generator = random.Random(seed)
    return fake_model(lambda request: generator.random())

"""The tokens of lm-evaluation-harness's requests, cut as its wrapper of transformers models cuts them.

Imported only where the harness is installed.
"""

from collections.abc import Sequence
from typing import Any

from lightning_mixcn.studies.harness import HarnessModel

from .requests import Request


class RequestTokens(HarnessModel):
    """The harness's model, which writes down what it is asked instead of answering."""

    def tokens(self, instances: Sequence[Any]) -> list[Request]:
        """Tokens of the context and the continuation of each request."""
        self._asked: list[Request] = []
        self.loglikelihood(list(instances), disable_tqdm=True)
        return self._asked

    def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> list[tuple[float, bool]]:
        self._asked = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return [(0.0, False)] * len(self._asked)

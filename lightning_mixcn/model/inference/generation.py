"""Tokens one by one, over a key-value cache that lasts from one prompt to the next.

transformers' ``generate`` gives the same tokens. It is left aside since a chat wants each token when it is there, to
stop between two of them, and to run only what is new of a conversation.

Legend: V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.causal_lm import CACHE_ARGUMENT, base_of
from lightning_mixcn.model.lora.attach import lora_layers
from lightning_mixcn.model.memory.budget import usable_bytes
from lightning_mixcn.model.nf4.storage import GemmStack, NF4Weight, few_rows_kernel

from .sampling import Sampling

# Tokens of a prompt in one forward pass, which bounds its attention mask and the experts' activations; a GPU decodes
# all weights for each.
_CHUNK = {"cpu": 1024, "cuda": 4096}


class PrefixCache:
    """Keys and values of a row, kept for the next row that begins alike. It belongs to one set of weights."""

    def __init__(self) -> None:
        """Begin empty."""
        self.clear()

    @property
    def ids(self) -> Sequence[int]:
        """Tokens whose keys and values it holds."""
        return self._ids

    def clear(self) -> None:
        """Forget all."""
        self._ids: list[int] = []
        # Without the configuration: layers with a sliding window could not be cropped.
        self._states = DynamicCache()

    def next_logits(self, model: nn.Module, ids: Sequence[int]) -> Tensor:
        """Run what it does not hold of a row.

        Args:
            model: The model, in evaluation mode.
            ids: The row, at least one token.

        Returns:
            float32 logits ``[V]`` of the token after the row.
        """
        self._crop(ids)
        base: Any = base_of(model)
        device, output = base.get_input_embeddings().weight.device, None
        size = _CHUNK.get(device.type, _CHUNK["cpu"])
        try:
            for start in range(len(self._ids), len(ids), size):
                chunk = list(ids[start : start + size])
                with torch.no_grad():
                    output = model(
                        input_ids=torch.tensor([chunk], device=device),
                        use_cache=True,
                        logits_to_keep=1,
                        output_router_logits=False,
                        **{CACHE_ARGUMENT: self._states},
                    )
                self._ids += chunk
        except BaseException:  # Ctrl-C too: some layers may have the chunk, and others not
            self.clear()
            raise
        assert output is not None, "a row has at least one token"
        logits_V: Tensor = output.logits[0, -1].float()
        return logits_V

    def _crop(self, ids: Sequence[int]) -> None:
        """Keep what ``ids`` begins with; its last token is run again, for its logits."""
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, ids[:-1], strict=False))
        kept = sum(1 for _ in alike)
        if kept < len(self._ids):
            self._states.crop(kept - len(self._ids))
            del self._ids[kept:]


def prepare_for_generation(model: nn.Module) -> int:
    """Make generation fast: products of a few rows decode 4-bit weights inside the kernel, see `few_rows_kernel`.

    A GPU keeps the decoded scales, an eighth of the 4 bits' memory, and LoRA factors in the compute dtype; a CPU keeps
    copies of the 4 bits. Nothing is kept on a CPU without bfloat16 instructions, for weights that are not in 4 bits or
    are sharded, or where it would take more than half of the free memory. A weight that is written later is no longer
    served by what is kept, and ``model.train()`` frees it.

    Args:
        model: A model of `load_moe`, or the PeftModel around it, in evaluation mode.

    Returns:
        Bytes of what is kept.
    """
    base: Any = base_of(model)
    device, dtype = base.lm_head.weight.device, base.model.embed_tokens.output_dtype
    stacks = [(module, few_rows_kernel(module)) for module in model.modules() if isinstance(module, NF4Weight)]
    held = [(stack, kernel) for stack, kernel in stacks if kernel is not None]
    # A CPU casts two experts' factors in less time than it multiplies with them.
    adapted = [layer for _, layer in lora_layers(model) if any(kernel is GemmStack for _, kernel in held)]
    needed = sum(kernel.planned_bytes(stack) for stack, kernel in held)
    needed += sum(layer.factor_bytes(dtype) for layer in adapted)
    if needed > _free_bytes(device) // 2:
        return 0
    for stack, kernel in held:
        stack.gemv = kernel(stack)
    for layer in adapted:
        layer.keep_factors(dtype)
    return needed


def _free_bytes(device: torch.device) -> int:
    taken = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return usable_bytes(device) - taken


def stream_tokens(
    model: nn.Module,
    ids: Sequence[int],
    cache: PrefixCache,
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    generator: torch.Generator,
) -> Iterator[int]:
    """Continue a row.

    Args:
        model: A model of `load_moe`, or the PeftModel around it, in evaluation mode.
        ids: The prompt's tokens.
        cache: Cache of this model and its present weights; what it holds of the prompt is not run again.
        sampling: Choice of the tokens.
        stop_ids: Tokens that end the answer.
        generator: Source of the random numbers, on the model's device.

    Returns:
        The tokens of the answer as they come, without the one that ends it; no more than the model's context has room
        for.

    Raises:
        ValueError: the prompt leaves no room in the model's context.
    """
    context = int(base_of(model).config.max_position_embeddings)
    if len(ids) >= context:
        raise UserError(
            f"the prompt has {len(ids)} tokens, but the model's context has room for {context} with the answer. "
            "Shorten it"
        )
    count = min(sampling.max_new_tokens, context - len(ids))
    return _generate(model, list(ids), cache, sampling, count, stop_ids, generator)


def _generate(
    model: nn.Module,
    row: list[int],
    cache: PrefixCache,
    sampling: Sampling,
    count: int,
    stop_ids: Collection[int],
    generator: torch.Generator,
) -> Iterator[int]:
    processors: Any = _processors(sampling)  # which ask for a LongTensor, a name that torch no longer makes
    for _ in range(count):
        logits_1V = cache.next_logits(model, row)[None]
        scores_1V: Tensor = processors(torch.tensor([row], device=logits_1V.device), logits_1V)
        if sampling.temperature:
            token = int(torch.multinomial(scores_1V.softmax(-1), 1, generator=generator))
        else:
            token = int(scores_1V.argmax())
        if token in stop_ids:
            return
        row.append(token)
        yield token


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """Return what transformers' ``generate`` does to logits with these settings, in its order."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
    return processors

"""How alike the experts of a layer are: their weights.

Legend: E experts, O and I a matrix's rows and columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mixcn.model.adapters import base_of

# Elements of each expert's matrix compared at a time, in float32.
_CHUNK = 2**22


@torch.no_grad()
def weight_cosines(model: nn.Module, layer: int) -> Tensor:
    """Cosine between the weights of two experts of a layer, the mean over gate, up and down.

    Args:
        model: A Mixtral of `load_mixtral` or the PeftModel around it; 4-bit weights are decoded, adapters added.
        layer: Its number.

    Returns:
        float64 ``[E, E]`` on the CPU; 0 beside a matrix of zeros.
    """
    base: Any = base_of(model)
    experts = base.model.layers[layer].mlp.experts
    dtype = base.model.embed_tokens.output_dtype
    cosines = [_cosines(projection, dtype) for projection in (experts.gate_proj, experts.up_proj, experts.down_proj)]
    return torch.stack(cosines).mean(0)


def _cosines(projection: Any, dtype: torch.dtype) -> Tensor:
    groups, rows, columns = projection.storage.shape
    decode: Callable[[int], Tensor] = projection.storage.decoder(dtype)
    matrices_OI = [decode(expert) for expert in range(groups)]
    factors = projection.factors(torch.float32)
    products_EE = torch.zeros(groups, groups, dtype=torch.float64)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part_EOI = torch.stack([matrix[start : start + step].float() for matrix in matrices_OI])
        if factors is not None:
            part_EOI += factors.b[:, start : start + step] @ factors.a
        part_EN = part_EOI.flatten(1)
        products_EE += (part_EN @ part_EN.t()).double().cpu()
    norm_E = products_EE.diagonal().sqrt()
    return products_EE / (norm_E[:, None] * norm_E).clamp_min(torch.finfo(torch.float64).tiny)

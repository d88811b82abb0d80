"""RMS normalisation that is one kernel on CUDA."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm


class FusedRMSNorm(MixtralRMSNorm):
    """transformers' norm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467) with torch's fused kernel on CUDA.

    Step by step, as transformers has it, a norm moves 36 bytes an element forward and some 60 backward, and keeps its
    input in float32 for backward; fused it moves 4 and 6, and keeps the input as it is. The 65 norms of Mixtral-8x7B
    move 26 MB a token in steps, 9 µs of an H100's memory at 80 % of 3.35 TB/s, where 7,250 tokens/s leave 138 for all;
    and keep 1.1 MB a token, twice what they need to. On other devices this is transformers' norm, bit for bit.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to the same; the mean square is taken in float32 either way."""
        if hidden_states.is_cuda and torch.version.cuda is not None:
            # Fused only if the weight has the same dtype, which a frozen one has.
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        normalised: Tensor = super().forward(hidden_states)
        return normalised

"""Sparse upcycling: a dense model becomes a mixture whose experts start as its feed-forward layers.

Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (arXiv:2212.05055). The
families here divide the weights of the chosen experts by their sum, so identical experts give the dense model's output
whatever the router says.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from lightning_mixcn.arguments import Between, Seed
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import check_output
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.files.written import say_written
from lightning_mixcn.model.architectures import UpcycledFamily

if TYPE_CHECKING:  # their imports take seconds, for which `mixcn upcycle --help` does not wait
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig

    from .dense import DenseSource

# E = experts, H = hidden, O × I = out × in features of one feed-forward matrix

_KEPT_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)
_ROUTER_STD = 0.02
_AUXILIARY_LOSS_COEFFICIENT = 0.02


def upcycle(
    src: str | Path,
    out: str | Path,
    *,
    num_experts: Annotated[int, Between(1, 1024)] = 8,
    num_experts_per_tok: Annotated[int, Between(1, 1024)] = 2,
    noise: Annotated[float, Between(0, 100)] = 0.0,
    family: UpcycledFamily | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    seed: Seed = 0,
) -> None:
    """Make a mixture of experts of a dense Llama, Mistral or Qwen3.

    Every expert starts as a copy of the layer's feed-forward matrices, and each router is drawn from a normal
    distribution of standard deviation 0.02. Weights are streamed: peak memory is one shard of 1 GB (and, for a GGUF,
    the dense model in float32).

    Args:
        src: Dense model: a Hugging Face folder or hub id with safetensors in float32, float16 or bfloat16, or a .gguf
            file.
        out: Folder to make; it must not exist, or be empty.
        num_experts: Number of experts in each layer.
        num_experts_per_tok: Number of experts that compute each token; at most num_experts.
        noise: Distance of the experts at the start: each expert's matrices get independent normal noise of this many
            standard deviations of the matrix (a number without unit, e.g. 0.01). 0 gives identical experts and exactly
            the dense model's logits.
        family: Architecture of the result. Null takes the one whose attention is the source's; the other is refused,
            since Qwen3 alone normalises queries and keys.
        dtype: Number format of the result: float32, float16 or bfloat16. Null keeps the source's (float32 for a GGUF).
        seed: Seed of the routers and the noise; the same seed gives the same bytes.

    Raises:
        FileNotFoundError: `src` is not there or lacks its config or weights.
        FileExistsError: `out` is not empty.
        ValueError: `src` is nothing that the family can express, or an argument is out of range.
        ModuleNotFoundError: `src` is a GGUF file and the package gguf is not installed.
        OSError: the disk is full.
    """
    _check_arguments(num_experts, num_experts_per_tok, noise, family, dtype)
    import torch
    from tqdm.auto import tqdm

    from lightning_mixcn.model.checkpoints.writer import new_checkpoint

    check_output(Path(out).expanduser())
    source = open_dense(src, family)
    target_dtype = getattr(torch, dtype) if dtype else None
    config = upcycled_config(source, num_experts, num_experts_per_tok, target_dtype or source.dtype)
    settings = config.to_diff_dict() | {source.architecture.expert_count: num_experts}
    with new_checkpoint(out, settings) as writer:
        total_bytes = _expected_bytes(source, num_experts, target_dtype or source.dtype)
        writer.require_free_bytes(total_bytes)
        source.save_tokenizer(writer.folder)
        with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="Upcycling", delay=1) as progress:
            for name, tensor in _mixture_tensors(source, num_experts, noise, target_dtype, seed):
                writer.add(name, tensor)
                progress.update(tensor.nbytes)
    say_written(
        Path(out).expanduser(),
        f"the mixture of {num_experts} experts a layer. Next: mixcn quantize {shlex.quote(str(out))} OUT, or train it "
        "as `model.init_args.base`",
    )


def upcycled_config(
    source: DenseSource, num_experts: int, num_experts_per_tok: int, dtype: torch.dtype
) -> PreTrainedConfig:
    """Write a dense model's config as its family's, with the auxiliary load-balancing loss weighted 0.02.

    Args:
        source: The dense model.
        num_experts: Number of experts in each layer.
        num_experts_per_tok: Number of experts that compute each token.
        dtype: Value of `dtype` in the config.
    """
    dense, architecture = source.config, source.architecture
    kept: dict[str, Any] = {key: getattr(dense, key) for key in _KEPT_SETTINGS}
    kept[architecture.expert_width] = dense.intermediate_size
    config: PreTrainedConfig = architecture.config(
        **kept,
        **architecture.upcycled,
        rope_parameters=dict(dense.rope_parameters),
        sliding_window=getattr(dense, "sliding_window", None),
        num_local_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        router_aux_loss_coef=_AUXILIARY_LOSS_COEFFICIENT,
        architectures=[architecture.causal_lm.__name__],
        dtype=dtype,
    )
    return config


def _mixture_tensors(
    source: DenseSource, num_experts: int, noise: float, dtype: torch.dtype | None, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the mixture's tensors under their per-expert names, layer by layer, one dense tensor at a time."""
    import torch

    from lightning_mixcn.model.checkpoints.layout import disk_names

    architecture = source.architecture
    for name in source.shapes:
        tensor = source.read(name).to(dtype)
        layer, _, matrix = name.removesuffix(".weight").partition(".mlp.")
        if not matrix:
            yield name, tensor
            continue
        if matrix == "gate_proj":
            router = f"{disk_names(architecture, f'{layer}.mlp.gate.linear', 1)[0]}.weight"
            scores_EH = torch.randn(num_experts, source.config.hidden_size, generator=_generator(seed, router))
            yield router, (scores_EH * _ROUTER_STD).to(tensor.dtype)
        for expert in disk_names(architecture, f"{layer}.mlp.experts.{matrix}", num_experts):
            yield f"{expert}.weight", _perturbed(tensor, noise, _generator(seed, f"{expert}.weight"))


def _perturbed(weight_OI: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Add ``noise`` × std(weight) × N(0, 1), computed in float32."""
    import torch

    if noise == 0:
        return weight_OI
    scale = noise * weight_OI.float().std(correction=0)
    noise_OI = torch.randn(weight_OI.shape, generator=generator)
    return noise_OI.mul_(scale).add_(weight_OI).to(weight_OI.dtype)


def _generator(seed: int, name: str) -> torch.Generator:
    """Make a generator for one tensor, whose numbers depend on nothing but the seed and the tensor's name."""
    import torch

    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _expected_bytes(source: DenseSource, num_experts: int, dtype: torch.dtype) -> int:
    """Count the bytes of the result's weights, for the progress bar and the check of free disk space."""
    copies = {name: num_experts if ".mlp." in name else 1 for name in source.shapes}
    elements = sum(math.prod(shape) * copies[name] for name, shape in source.shapes.items())
    routers: int = source.config.num_hidden_layers * num_experts * source.config.hidden_size
    return (elements + routers) * dtype.itemsize


def _check_arguments(
    num_experts: int, num_experts_per_tok: int, noise: float, family: str | None, dtype: str | None
) -> None:
    if num_experts < 1:
        raise UserError(f"`num_experts` must be at least 1, not {num_experts}")
    if not 1 <= num_experts_per_tok <= num_experts:
        raise UserError(
            f"`num_experts_per_tok` must be between 1 and num_experts={num_experts}, not {num_experts_per_tok}"
        )
    if not (math.isfinite(noise) and noise >= 0):
        raise UserError(f"`noise` must be a finite number of standard deviations, 0 or more, not {noise}")
    if family not in (None, *get_args(UpcycledFamily)):
        raise UserError(f"`family` must be {' or '.join(get_args(UpcycledFamily))} or null, not {family!r}")
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise UserError(f"`dtype` must be float32, float16, bfloat16 or null, not {dtype!r}")


def open_dense(src: str | Path, family: UpcycledFamily | None = None) -> DenseSource:
    """Open a folder, hub id or ``.gguf`` file, and refuse what its family of mixtures cannot express.

    Args:
        src: A Hugging Face folder or hub id of a dense model in float weights, or a GGUF file of one.
        family: Architecture that is wanted; ``None`` for the one that continues the source's.

    Returns:
        The source; a GGUF's weights are in memory in float32, a folder's are on the disk.

    Raises:
        FileNotFoundError: there is no such folder or file, or it lacks its config or weights.
        ValueError: another architecture or family, biases, quantised weights, missing or unexpected tensors, or a
            broken file.
        ModuleNotFoundError: a GGUF was given, and the package ``gguf`` is not installed.
    """
    from .dense import _open_folder

    path = Path(src).expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        from .gguf import open_gguf

        return open_gguf(path, family)
    folder = local_folder(src)
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and not any(folder.glob("*.safetensors")):
        raise UserError(f"{str(src)!r} is a folder of GGUF files. Give one of the files, e.g. {str(ggufs[0])!r}")
    return _open_folder(str(src), folder, family)

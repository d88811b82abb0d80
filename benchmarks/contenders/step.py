"""Who takes part in train_step.py: ours, and every peer that can be imported here.

Each function makes a model that trains; a peer that cannot raises, and the reason stands in the result. ``NOTES`` says
what a peer does not do, so that a figure is not taken for more than it is.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

# The paper's names, which ours takes for every family.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

NOTES = {
    "stock": "transformers + PEFT: experts in bf16, W + BA of all experts made at each forward pass",
    "bitsandbytes": (
        "transformers + bitsandbytes replace_parameter_4bit: trains attention's adapters only, since PEFT's "
        "target_parameters find nothing under its parametrisation (a warning) and would train half of it by full path"
    ),
    "experts4bit": "experts4bit-qlora: adapters on experts and attention, none on the router",
    "unsloth": "Unsloth: its own LoRA, none on the router; on a CPU on attention alone, beside experts in bf16",
    "axolotl": "axolotl's quantize_moe_experts with its PEFT patches, without its trainer",
}


def lora(rank: int, dropout: float = 0.0, targets: list[str] = TARGETS) -> Any:
    """Return PEFT's configuration."""
    import peft

    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
    )


def ours(options: argparse.Namespace) -> Any:
    """Make 4-bit experts with split LoRA."""
    import torch
    from random_base import random_model

    from lightning_mixcn.cli.allocator import keep_freed_memory
    from lightning_mixcn.model import load_moe, set_activation_checkpointing

    keep_freed_memory()
    adapters = lora(options.rank, options.dropout)
    if options.base is None:
        model: Any = random_model(options.config, adapters, torch.device(options.device))
    else:
        model = load_moe(options.base, lora=adapters, device=options.device)
    set_activation_checkpointing(model, options.activation_checkpointing)
    return model.train()


def stock(options: argparse.Namespace) -> Any:
    """Make experts of transformers in bf16; PEFT adapts them as parameters and materialises W + BA."""
    import peft

    from lightning_mixcn.model.architectures import architecture_of

    # PEFT makes `target_parameters` of these names itself, and doubles the rank of gate and up, which are one there.
    targets = list(architecture_of(options.config).short_names)
    adapters = lora(options.rank, options.dropout, targets)
    return _checkpointed(peft.get_peft_model(_transformers(options), adapters), options)


def bitsandbytes(options: argparse.Namespace) -> Any:
    """Make experts of bitsandbytes' parametrised 4-bit parameters, decoded whole at each access."""
    import peft

    model = _quantised_experts(options)
    return _checkpointed(peft.get_peft_model(model, lora(options.rank, options.dropout, ATTENTION)), options)


def experts4bit(options: argparse.Namespace) -> Any:
    """Make PyPI's experts4bit-qlora."""
    _needs("experts4bit_qlora", "pip install 'experts4bit-qlora[train,fast]'")
    if options.dropout:
        raise ValueError("its adapters of experts have no dropout")
    import torch
    from experts4bit_qlora import add_attention_lora, load_moe_4bit_streaming

    rank = options.rank
    model, _ = load_moe_4bit_streaming(
        options.base, options.device, torch.bfloat16, r=rank, alpha=2 * rank, quant_type="nf4"
    )
    add_attention_lora(model, r=rank, alpha=2 * rank, dtype=torch.bfloat16)
    return _checkpointed(model, options)


def unsloth(options: argparse.Namespace) -> Any:
    """Use Unsloth's loader and adapters."""
    _needs("unsloth", "pip install unsloth")
    import unsloth as library

    model, _ = library.FastModel.from_pretrained(
        options.base, max_seq_length=options.sequence_length, load_in_4bit=True, use_gradient_checkpointing=False
    )
    targets = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    return library.FastModel.get_peft_model(
        model,
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        target_modules=targets,
        use_gradient_checkpointing=False,
    ).train()


def axolotl(options: argparse.Namespace) -> Any:
    """Make a model as axolotl does: bitsandbytes' parameters, and its patches of PEFT."""
    _needs("axolotl", "pip install axolotl")
    import peft
    from axolotl.monkeypatch import moe_quant

    moe_quant.patch_peft_target_parameters_matching()
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        target_modules=ATTENTION,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    return _checkpointed(peft.get_peft_model(_quantised_experts(options), config), options)


CONTESTANTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "ours": ours,
    "stock": stock,
    "bitsandbytes": bitsandbytes,
    "experts4bit": experts4bit,
    "unsloth": unsloth,
    "axolotl": axolotl,
}


def _needs(package: str, how: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"not installed here ({how})")


def _transformers(options: argparse.Namespace) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16).to(options.device)


def _quantised_experts(options: argparse.Namespace) -> Any:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = _transformers(options)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name, compress_statistics=True, quant_type="nf4")
    return model


def _checkpointed(model: Any, options: argparse.Namespace) -> Any:
    """Switch checkpointing on; transformers knows whole layers only, so selective is full for peers."""
    if options.activation_checkpointing != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()

"""`mixcn export`: write a trained model in the formats that other tools load."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from lightning_mixcn.arguments import Between, check_arguments
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import check_file, check_output
from lightning_mixcn.files.json_object import parse_object, read_object
from lightning_mixcn.files.schema import expect, mapping_of, real
from lightning_mixcn.files.written import say_written

if TYPE_CHECKING:
    from lightning_mixcn.model.find import ModelSource

_LARGEST_FACTOR = 100


def export(
    src: str,
    out: str,
    *,
    format: Literal["hf", "peft", "peft-per-expert", "gguf"] = "hf",
    base: Literal["original", "dequantised"] = "original",
    original: str | None = None,
    adapter: list[str] | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    layout: Literal["per-expert", "fused"] = "per-expert",
    max_shard_bytes: Annotated[int, Between(1, 10**15)] | None = None,
    outtype: str | None = None,
    llama_cpp: str | None = None,
    languages: list[str] | None = None,
    instruct_delta: str | None = None,
    instruct_weight: Annotated[float, Between(0, 2, excluded=(0,))] = 1.0,
    layer_scale: str | None = None,
) -> None:
    """Write SRC as a checkpoint or adapter that transformers, PEFT, vLLM and llama.cpp load.

    A merged model is written tensor by tensor: the host holds one shard and one matrix of a layer, whatever its size.
    Exporting twice gives the same bytes. Tokenizer, chat template and generation config (with the tokens that end an
    answer) are the run's, where SRC is a run or its adapter.

    Args:
        src: Hugging Face folder or hub id, 4-bit folder, run folder, or PEFT adapter folder.
        out: Folder to make (a file for gguf); it must not exist, or be empty.
        format: hf: adapters merged into one checkpoint. peft: the adapter in PEFT's fused layout for transformers 5.
            peft-per-expert: the adapter with one pair of factors an expert, which vLLM and llama.cpp read as well.
            gguf: merged, then through llama.cpp's converter.
        base: Weights to merge onto. original: the high-precision weights that 4 bits approximated in training;
            every weight differs from the trained model's by what quantisation rounded off. dequantised: what the 4 bits
            hold, which gives the very model that was trained, in float32.
        original: Folder or hub id of the high-precision base, if SRC was trained on a 4-bit folder and that base moved.
        adapter: Further PEFT adapters, each trained on what those before it give, merged in this order on top of SRC.
        dtype: Number format of a merged model: float32, float16 or bfloat16. Null keeps the base's, but is float32 for
            base=dequantised and for a gguf of outtype f32 or f16. In bfloat16, dequantised weights are rounded a second
            time: logits of the test model then differ from the trained model's by up to 0.85, in float32 by 2e-5.
        layout: Names of a merged model's experts. per-expert (block_sparse_moe.experts.N.w1.weight) is what
            transformers 4 and 5, vLLM and llama.cpp read; fused (mlp.experts.gate_up_proj) is transformers 5's own.
        max_shard_bytes: Size of a safetensors shard, in bytes. Null is 1 GB, or 250 MB with instruct_delta, which then
            takes at most half a gigabyte of host memory beside three times the largest tensor.
        outtype: Type of a gguf, handed to llama.cpp: f32, f16, bf16, q8_0 or auto; others such as q4_k_m need its
            llama-quantize. Null is auto, 16 bits.
        llama_cpp: Checkout of llama.cpp with its convert_hf_to_gguf.py. Null takes the environment's LLAMA_CPP, then
            the PATH.
        languages: Codes of the languages that the model card names, e.g. [zh,en]. Null takes what the adapter's card
            names, if anything.
        instruct_delta: Folder or hub id of the unquantised instruct model that was tuned from the base. What the tuning
            changed in any weight, W_instruct - W_base, is added to the merged one, so that a model that was adapted on
            plain text follows instructions (chat vector: Huang et al. 2023, arXiv 2310.04799; instruction residual:
            Jindal et al. 2024, arXiv 2410.10739). Tokenizer, chat template and generation config are then the instruct
            model's; pieces and rows beyond its vocabulary stay as SRC has them.
        instruct_weight: Factor of that difference, above 0 and at most 2. 1 is the whole; less keeps more of SRC.
        layer_scale: JSON file with a factor of 0 to 100 by layer or range of layers, e.g. {"0-7": 0, "8": 0.5}, or the
            same in place of a file. It counts for what the adapters change in attention, router and experts there; 1
            where a layer is not named. 0 is the base's layer, which the adaptation may not have needed (reverting
            layers: arXiv 2606.00284). Trained embeddings and head stay.

    Raises:
        FileNotFoundError: SRC, its base, or llama.cpp is not there.
        FileExistsError: OUT is not empty.
        ValueError: an adapter of another base, or options that do not go together.
        OSError: the disk is full.
    """
    from lightning_mixcn.model.find import find_model
    from lightning_mixcn.model.lora.adapter_file import AdapterFile

    from .adapter import LAYOUTS, export_adapter
    from .folder import ExportOptions, export_checkpoint
    from .gguf import export_gguf

    check_arguments(export, {"max_shard_bytes": max_shard_bytes, "instruct_weight": instruct_weight})
    target = Path(out).expanduser().resolve()
    options = ExportOptions(
        src, format, base, original, dtype, layout, max_shard_bytes, outtype, llama_cpp, languages, instruct_delta,
        instruct_weight
    )  # fmt: skip
    if format != "gguf" and (outtype, llama_cpp) != (None, None):
        raise UserError(f"`outtype` and `llama_cpp` are for `format=gguf`, not {format}. Leave them out")
    if format in LAYOUTS and options != ExportOptions(src, format, languages=languages):
        raise UserError(
            f"`format={format}` merges nothing: leave out base, original, dtype, layout, max_shard_bytes, "
            "instruct_delta and instruct_weight"
        )
    if instruct_delta is None and instruct_weight != 1.0:
        raise UserError(f"`instruct_weight={instruct_weight!r}` needs `instruct_delta`. Give both, or leave it out")
    if instruct_delta is not None and base == "dequantised":
        raise UserError(
            f"`instruct_delta={instruct_delta!r}` cannot be added with `base=dequantised`: the difference from weights "
            "that 4 bits rounded holds the rounding, too, and would undo it. Leave out `base`"
        )
    (check_file if format == "gguf" else check_output)(target)
    found = find_model(src)
    for further in adapter or ():
        found = found.with_adapter(AdapterFile(further, found.architecture))
    if layer_scale is not None:
        found = _scaled(found, layer_scale)
    writers = {"hf": export_checkpoint, "gguf": export_gguf, **dict.fromkeys(LAYOUTS, export_adapter)}
    writers[format](found, target, options)
    say_written(target, _READ_BY[format].format(out=shlex.quote(str(target))))


_READ_BY = {
    "hf": "the whole model. Talk to it with mixcn chat {out}, serve it with vllm serve {out}, or load it with "
    "AutoModelForCausalLM.from_pretrained",
    "gguf": "the whole model for llama.cpp. Talk to it with llama-cli -m {out}",
    "peft": "the adapter for transformers 5 and later. Load the base, then PeftModel.from_pretrained(base, {out})",
    "peft-per-expert": "the adapter. Serve it with vllm serve BASE --enable-lora --lora-modules adapted={out}",
}


def _scaled(found: "ModelSource", layer_scale: str) -> "ModelSource":
    """Return the model with its adapters scaled by the factors in a file."""
    from lightning_mixcn.model.checkpoints.reading import model_config

    if not found.adapters:
        raise UserError(
            f"`layer_scale={layer_scale!r}` scales adapters, of which SRC has none. Give a run or an adapter, or leave "
            "it out"
        )
    layers = model_config(found.base).num_hidden_layers
    number = expect(
        f"the number of a layer, 0 to {layers - 1}, or a range such as 0-{layers - 1}",
        lambda name: _layers(name, layers) is not None,
    )
    checked, remedy = mapping_of(number, real(0, _LARGEST_FACTOR)), 'Give one factor a layer, e.g. {"0": 0, "1-3": 0.5}'
    if layer_scale.startswith("{"):
        given = parse_object(layer_scale.encode(), "`layer_scale`", checked, remedy=remedy)
    else:
        given = read_object(Path(layer_scale).expanduser(), checked, remedy=remedy)
    factors: dict[int, float] = {}
    for name, factor in given.items():
        for layer in _layers(name, layers) or ():
            if layer in factors:
                raise UserError(f"`layer_scale={layer_scale!r}` names layer {layer} twice. {remedy}")
            factors[layer] = float(factor)
    return found.scaled_by_layer(factors)


def _layers(name: str, depth: int) -> range | None:
    """Return the layers of a key, as ``3`` or ``0-7`` with both ends; null where it names none."""
    numbers = {str(layer): layer for layer in range(depth)}
    first, dash, last = name.partition("-")
    start, stop = numbers.get(first), numbers.get(last if dash else first)
    return None if start is None or stop is None or start > stop else range(start, stop + 1)

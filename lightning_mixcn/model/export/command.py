"""`mixcn export`: write a trained model in the formats that other tools load."""

from pathlib import Path
from typing import Annotated, Literal

from lightning_mixcn.arguments import Between, check_arguments
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import check_file, check_output


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
    writers = {"hf": export_checkpoint, "gguf": export_gguf, **dict.fromkeys(LAYOUTS, export_adapter)}
    writers[format](found, target, options)

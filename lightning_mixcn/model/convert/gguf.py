"""Read a GGUF file of a dense model for upcycling, through transformers.

transformers ignores what it does not know in a GGUF — a mixture of Llama's kind comes back as a re-initialised Llama,
rope factors of Llama 3.1 are dropped — so everything in the file is checked against the architecture first.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from lightning_mixcn.errors import MissingFileError, UserError, require_package
from lightning_mixcn.model.architectures import Architecture

from .dense import (
    DenseSource,
    check_tensors,
    continued_by,
    dense_config,
)

_TENSOR = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_((?P<norm>[qk]_norm)|norm|q|k|v|output)|ffn_(norm|gate|up|down)))"
    r"\.weight"
)
# By architecture, what transformers takes instead of reading it from the file.
_UNREAD: dict[str, dict[str, Any]] = {
    "llama": {"rope.scaling.type": "none"},
    "mistral": {"rope.scaling.type": "none"},
    "qwen3": {"rope.scaling.type": "none", "attention.key_length": 128},
}

# GGUF's name → transformers'
_SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_ADD_BOS = "tokenizer.ggml.add_bos_token"
# Where the file does not say whether BOS comes before a text, llama.cpp puts it there in these pre-tokenizers' texts.
_BOS_UNASKED = ("llama3", "llama-v3", "llama-bpe")


def open_gguf(path: Path, family: str | None) -> DenseSource:
    """Dequantise a GGUF file into float32 on the CPU. See `open_dense` for what it raises."""
    if not path.is_file():
        raise MissingFileError(f"`src={path}` is not there. Give a .gguf file or a Hugging Face folder")
    require_package("gguf", f"`src={path}` is a GGUF file; reading it")
    architecture, special_ids, begins = _check_content(path, family)
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(  # typed as the model alone
        path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(report["mismatched_keys"])
    if missing:  # it would have drawn them at random
        raise UserError(f"`src={path}`: tensors {missing[:3]} are missing or do not fit. Download the file again")
    raw = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config = dense_config(str(path), raw, architecture)
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return DenseSource(
        name=str(path),
        config=config,
        architecture=architecture,
        shapes=check_tensors(str(path), config, architecture, shapes),
        dtype=torch.float32,
        read=tensors.__getitem__,
        save_tokenizer=lambda out: _save_tokenizer(path, special_ids, begins, out),
    )


def _check_content(path: Path, family: str | None) -> tuple[Architecture, dict[str, int], bool]:
    """Refuse what transformers would misread: other architectures, experts, biases, scaled rope.

    Returns:
        The family of mixtures, transformers' name → id of each special token that the file declares, and whether BOS
        comes before a text though the file does not say so.
    """
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"`src={path}` is not a GGUF file (it does not begin with GGUF). Download it again")
    try:
        reader = GGUFReader(path)
        fields: dict[str, Any] = dict(reader.fields)
        names = [tensor.name for tensor in reader.tensors]
    except (ValueError, IndexError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"`src={path}` is truncated or damaged ({reason}). Download it again") from error
    kind: Any = fields["general.architecture"].contents() if "general.architecture" in fields else None
    architecture = continued_by(str(path), {"model_type": kind}, family)  # dense models have one name in both
    held = {key: fields[f"{kind}.{key}"].contents() for key in _UNREAD[kind] if f"{kind}.{key}" in fields}
    unknown = [f"{key}={value}" for key, value in held.items() if value != _UNREAD[kind][key]]
    unknown += [name for name in names if not _fits(name, architecture)]
    if unknown:
        raise UserError(
            f"`src={path}` holds {unknown[0]}, which transformers does not read from a GGUF of this architecture or a "
            f"{architecture.title} cannot express. Give the model's Hugging Face folder, if it is a plain {kind}"
        )
    keys = {name: f"tokenizer.ggml.{key}_token_id" for key, name in _SPECIAL_TOKENS.items()}
    pre = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else None
    begins = _ADD_BOS not in fields and pre in _BOS_UNASKED
    return architecture, {name: int(fields[key].contents()) for name, key in keys.items() if key in fields}, begins


def _fits(name: str, architecture: Architecture) -> bool:
    found = _TENSOR.fullmatch(name)
    norms = architecture.attention_norms(architecture.config())
    return found is not None and (found["norm"] is None or found["norm"] in norms)


def _save_tokenizer(path: Path, special_ids: dict[str, int], begins: bool, out: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for name, token_id in special_ids.items():  # transformers 5.17 takes the first control token for all of them
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    if begins or tokenizer.add_bos_token:
        tokenizer.add_bos_token = True  # which also makes the rule again, with the token set above
    tokenizer.save_pretrained(out)
    # Only this class takes tokenizer.json as it is: others rebuild parts of it.
    file = out / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("is_local", "local_files_only", "gguf_file"):  # how it was loaded, not what it is
        content.pop(key, None)
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

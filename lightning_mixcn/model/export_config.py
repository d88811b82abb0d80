"""``config.json`` of an exported checkpoint, for readers of transformers 4 and 5."""

from typing import Any

import torch

from .loading import stock_settings

_DROPPED = ("_name_or_path", "torch_dtype")


def exported_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The base's configuration as that of an unquantised Mixtral in `dtype`.

    transformers 5 writes ``dtype`` and ``rope_parameters``; transformers 4, vLLM and llama.cpp read ``torch_dtype``
    and ``rope_theta``, and would silently fall back to a default. Both are written.

    Args:
        config: Content of the base's ``config.json``.
        dtype: Of the exported weights.
    """
    kept = {key: value for key, value in stock_settings(config).items() if key not in _DROPPED}
    name = str(dtype).removeprefix("torch.")
    kept |= {"architectures": ["MixtralForCausalLM"], "dtype": name, "torch_dtype": name}
    rope = kept.get("rope_parameters") or {}
    if "rope_theta" in rope:
        kept.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        kept.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    return kept

"""BOS in front of a text: whether a tokenizer puts it there, and having one do so, or not.

transformers 5 reads this from ``tokenizer.json``'s post-processor alone; ``add_bos_token`` of ``tokenizer_config.json``
counts only where there is no ``tokenizer.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers


def puts_bos_first(backend: tokenizers.Tokenizer, bos: str | None) -> bool:
    """Tell whether a tokenizer puts BOS in front of a text.

    Args:
        backend: The tokenizer.
        bos: The token; None of a tokenizer that has none.
    """
    first: list[str] = backend.encode("a").tokens[:1]
    return bos is not None and first == [bos]


def put_bos_first(backend: tokenizers.Tokenizer, bos: str) -> None:
    """Have a tokenizer put BOS in front of a text, and nothing else anywhere, as Llama's and Mistral's do.

    Args:
        backend: The tokenizer, whose post-processor is replaced.
        bos: A token of its vocabulary.
    """
    from tokenizers import processors

    index = backend.token_to_id(bos)
    assert index is not None, "it is in the vocabulary"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )


def take_out_bos(file: Path) -> None:
    """Rewrite a ``tokenizer.json`` that puts BOS in front of a text so that it does not; other rules stay.

    Args:
        file: The ``tokenizer.json``.
    """
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    processor = content["post_processor"]
    for part in processor.get("processors", [processor]):
        if part["type"] == "TemplateProcessing" and (bos := _special(part["single"][0])):
            for name in ("single", "pair"):
                part[name] = [piece for piece in part[name] if _special(piece) != bos]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _special(piece: dict[str, Any]) -> str | None:
    """Return the token of a template's piece; None of a piece that is text."""
    token: str | None = piece.get("SpecialToken", {}).get("id")
    return token

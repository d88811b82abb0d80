"""What goes with an adapter's weights: tokenizer, chat template and generation settings, as the run used them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_mixcn.data import InstructDataModule
from lightning_mixcn.model.hub import local_folder
from lightning_mixcn.model.tokenizer_files import GENERATION_FILE, tokenizer_files
from lightning_mixcn.model.tokenizer_pieces import has_tokenizer
from lightning_mixcn.modules import CausalLMModule
from lightning_mixcn.text import TextTokenizer, load_tokenizer, portable_source
from lightning_mixcn.text.sentencepiece_bpe import PROBES

_TEMPLATE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"
_FAST = "tokenizer.json"


@dataclass(frozen=True)
class ChatFormat:
    """How the answers of a run were laid out.

    Args:
        source: The chat template in Jinja; ``None`` if it cannot be written so.
        end_ids: Tokens that end an answer.
        name: What the run's configuration calls the template.
    """

    source: str | None
    end_ids: tuple[int, ...]
    name: str


class RunFiles:
    """The files of a run's tokenizer, from which transformers makes the tokenizer that the run used.

    Args:
        trainer: Lightning's; its data are set up.
        module: The module.

    Attributes:
        chat: How answers were laid out; ``None`` if the data are not an `InstructDataModule`.
    """

    def __init__(self, trainer: Trainer, module: CausalLMModule) -> None:
        """Ask the data for tokenizer and template."""
        data: Any = getattr(trainer, "datamodule", None)
        self._tokenizer: TextTokenizer | None = getattr(data, "tokenizer", None)
        self._base = local_folder(module.base)
        self._source = self._tokenizer.path if self._tokenizer else local_folder(module.tokenizer_path)
        if self._tokenizer is None and has_tokenizer(self._source):
            self._tokenizer = load_tokenizer(self._source)
        self._is_read_right: bool | None = None
        self.chat: ChatFormat | None = None
        if isinstance(data, InstructDataModule):
            template, tokenizer = data.template, data.tokenizer
            ends = tuple(sorted(template.stop_ids(tokenizer)))
            self.chat = ChatFormat(portable_source(template, tokenizer), ends, data.template_name)

    def write(self, folder: Path) -> None:
        """Write all of them. After an `InstructDataModule`, template and end tokens are those of the answers."""
        # As they are: transformers would write some of the tokenizer's files differently.
        for file in tokenizer_files(self._source):
            shutil.copyfile(file, folder / file.name)
        if self._tokenizer is not None:
            if self.chat is not None and self.chat.source != _own_template(self._tokenizer):
                _replace_template(folder, self.chat.source)
            if self._is_read_right is None:
                self._is_read_right = _is_read_right(folder, self._tokenizer)
            if not self._is_read_right:
                _keep_as_it_is(folder, self._tokenizer)
        settings = self._generation_settings()
        if settings is not None:
            _write_json(folder / GENERATION_FILE, settings)

    def _generation_settings(self) -> dict[str, Any] | None:
        """Those beside the tokenizer, else the base's; after an `InstructDataModule` with what ends an answer."""
        files = [place / GENERATION_FILE for place in (self._source, self._base)]
        found = next((file for file in files if file.is_file()), None)
        settings: dict[str, Any] = {} if found is None else json.loads(found.read_text(encoding="utf-8"))
        if self.chat is None:
            return settings if found else None
        known = settings.get("eos_token_id")
        known = known if isinstance(known, list) else [] if known is None else [known]
        ends = list(dict.fromkeys([*known, *self.chat.end_ids]))
        if self._tokenizer is not None:
            settings.setdefault("bos_token_id", self._tokenizer.bos_id)
        return settings | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def _own_template(tokenizer: TextTokenizer) -> str | None:
    """The template in the tokenizer's own files."""
    return str(tokenizer.hf.get_chat_template()) if tokenizer.hf.chat_template else None


def _replace_template(folder: Path, source: str | None) -> None:
    """Make this the only chat template of a tokenizer's folder; ``None``: let it have none."""
    for name in (_TEMPLATE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    settings = _read_json(folder / _SETTINGS)
    if settings.pop("chat_template", None) is not None:
        _write_json(folder / _SETTINGS, settings)
    if source is not None:
        (folder / _TEMPLATE).write_text(source, encoding="utf-8")


def _is_read_right(folder: Path, tokenizer: TextTokenizer) -> bool:
    """Whether transformers reads a folder's tokenizer as the run did."""
    from transformers import AutoTokenizer

    try:
        stock: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):  # where the class is not stated, it asks for a model's configuration
        return False
    ids = [stock(probe, add_special_tokens=False, split_special_tokens=True)["input_ids"] for probe in PROBES]
    return bool(ids == tokenizer.encode_batch(PROBES))


def _keep_as_it_is(folder: Path, tokenizer: TextTokenizer) -> None:
    """Have transformers take the tokenizer as it is: by its class it would rebuild parts, and some differently."""
    from tokenizers import Tokenizer, processors

    settings = _read_json(folder / _SETTINGS)
    names = {name: str(getattr(tokenizer.hf, name)) for name in ("bos_token", "eos_token")}
    backend = Tokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())
    # Llama's classes put BOS before a text whatever tokenizer.json says; the class that is stated now goes by the file.
    by_class = "Llama" in settings.get("tokenizer_class", "Llama") and settings.get("add_bos_token", True)
    if by_class and tokenizer.bos_id not in backend.encode("a").ids:
        bos = names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
        )
    backend.save(str(folder / _FAST))
    _write_json(folder / _SETTINGS, names | settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

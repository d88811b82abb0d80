"""Tokenizers that encode text as their checkpoint's model was trained on it, or refuse.

transformers 5 tokenizes Mixtral wrongly when it has only ``tokenizer.model``, and wrongly on leading and double blanks
when ``tokenizer_class`` says Llama although ``tokenizer.json`` is right; and it turns a literal ``<s>`` in a text into
the special token. Hence ``tokenizer.json`` is used as it is, compared with SentencePiece where the checkpoint has
its model, and special tokens are never read out of text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.files.schema import FLAG, NULL, TEXT, each, either, real, record

from .begin import put_bos_first, puts_bos_first
from .sentencepiece import (
    PROBES,
    build_fast_tokenizer,
    check_against_sentencepiece,
    special_pieces,
)

if TYPE_CHECKING:
    import tokenizers
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_KEPT_SETTINGS = ("chat_template", "model_max_length")
_TOKEN = either(NULL, record({"content": TEXT}), TEXT)  # a serialised AddedToken, or its text
_FLAG = either(NULL, FLAG)
_SETTINGS = record(
    {},
    {
        **dict.fromkeys(_SPECIAL_NAMES, _TOKEN),
        "chat_template": either(NULL, each(record({"name": TEXT, "template": TEXT})), TEXT),
        "add_bos_token": _FLAG,
        "add_eos_token": _FLAG,
        "model_max_length": either(NULL, real(1, 1e40)),  # transformers' mark of no limit is 1e30
        "tokenizer_class": either(NULL, TEXT),
    },
)


class TextTokenizer:
    """Text to token ids and back, without special tokens.

    It can be pickled, and sent to loader workers. Made by `load_tokenizer`.

    Args:
        backend: The tokenizer of the ``tokenizers`` library; it is copied.
        path: Folder it came from.
        settings: Contents of ``tokenizer_config.json``, with the special tokens' names as strings.

    Attributes:
        bos_id: Id of BOS.
        eos_id: Id of EOS.
        begin_ids: Ids in front of a text, a document's in training too: BOS where the tokenizer itself puts it there,
            else none, so that what is trained is what stock transformers and llama.cpp make of a text.

    Raises:
        ValueError: BOS or EOS is not set or not in the vocabulary, or a special token can be written in text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, path: Path, settings: dict[str, Any]) -> None:
        """Copy the backend and check its special tokens."""
        self.path = path
        self._settings = settings
        self._set_backend(backend.to_str())
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.begin_ids = (self.bos_id,) if puts_bos_first(self._backend, settings["bos_token"]) else ()
        self._refuse_special_tokens_from_text()

    def _set_backend(self, serialized: str) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(serialized)
        self._backend.no_truncation()
        self._backend.no_padding()
        # Neither a copy nor a pickle of the backend keeps this flag, and transformers resets it at each call:
        # hence a backend of our own.
        self._backend.encode_special_tokens = True

    def __getstate__(self) -> dict[str, Any]:
        """Replace the backend, whose pickle would forget `encode_special_tokens`, with its JSON."""
        state = {key: value for key, value in self.__dict__.items() if key not in ("_backend", "hf", "fingerprint")}
        return state | {"backend": self._backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the backend."""
        self._set_backend(state.pop("backend"))
        self.__dict__.update(state)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts; no special token is added, and none is read out of the text.

        Args:
            texts: Any strings that are valid Unicode.

        Returns:
            One list of token ids a text.
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_batch_with_bytes(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Encode texts and credit every UTF-8 byte of a text to one token.

        A token is credited with the characters that it reaches first: of a character in several byte-fallback tokens,
        the first token has all bytes and the others none.

        Args:
            texts: Any strings that are valid Unicode.

        Returns:
            For each text the token ids ``[tokens]`` and bytes ``[tokens]``, both int32. The bytes sum to the text's
            (unless there is no token at all).
        """
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.asarray(encoding.ids, dtype=np.int32), _credit_bytes(text, encoding.offsets))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode ids to text.

        Args:
            ids: Token ids.
            skip_special_tokens: Leave out BOS, EOS and the like.

        Returns:
            The text, exactly as encoded, except that a SentencePiece tokenizer gives U+2581 back as a blank.
        """
        return str(self._backend.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens))

    def num_bytes(self, ids: Sequence[int]) -> int:
        """Count the UTF-8 bytes of the text of some tokens, without BOS and EOS.

        A character of which only a part is there counts as a byte for each replacement character that it decodes to:
        one byte less than there are, at most, where a row cuts a character of three bytes.
        """
        return len(self.decode(ids).replace("\N{REPLACEMENT CHARACTER}", "?").encode())

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def added_tokens(self) -> dict[str, tuple[int, bool]]:
        """Tokens beside the vocabulary's pieces: the id of each, and whether it is special (never read out of text)."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: (int(index), token.special) for index, token in added.items()}

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the vocabulary, the special tokens, and what becomes of the probe texts."""
        behaviour = [sorted(self._backend.get_vocab().items()), self.bos_id, self.eos_id, self.encode_batch(PROBES)]
        if not self.begin_ids:  # all rows began with BOS once, and where they do, runs of that time go on
            behaviour.append("no BOS first")
        return hashlib.blake2b(json.dumps(behaviour).encode(), digest_size=16).hexdigest()

    @cached_property
    def hf(self) -> PreTrainedTokenizerFast:
        """The transformers tokenizer of the same folder, for chat templates, saving and other libraries.

        Unlike `encode_batch`, calling it turns literal special tokens into special tokens.

        Raises:
            ValueError: transformers made another tokenizer of the folder's files.
        """
        from transformers import PreTrainedTokenizerFast

        # Not AutoTokenizer: it would follow `tokenizer_class` and rebuild the tokenizer.
        special = {name: self._settings[name] for name in _SPECIAL_NAMES if self._settings.get(name)}
        kept = {name: self._settings[name] for name in _KEPT_SETTINGS if self._settings.get(name) is not None}
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers'
            tokenizer_object=self._backend,
            name_or_path=str(self.path),
            clean_up_tokenization_spaces=False,
            **special,
            **kept,
        )
        for probe, expected in zip(PROBES, self.encode_batch(PROBES), strict=True):
            got = tokenizer(probe, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if got != expected:
                raise UserError(f"transformers encodes {probe!r} with `{self.path}` as {got}, expected {expected}.")
        return tokenizer

    def _special_id(self, name: str) -> int:
        token = self._settings.get(name)
        if not token:
            raise UserError(
                f"The tokenizer of `{self.path}` has no `{name}`. Set it in tokenizer_config.json: rows end documents "
                "with EOS, and begin them with BOS if the tokenizer does."
            )
        index = self._backend.token_to_id(token)
        if index is None:
            raise UserError(
                f"`{name}={token!r}` of `{self.path}` is not in its vocabulary. Mend its tokenizer_config.json."
            )
        return int(index)

    def _refuse_special_tokens_from_text(self) -> None:
        added = {index: token for index, token in self._backend.get_added_tokens_decoder().items() if token.special}
        special = {index: token.content for index, token in added.items()}
        special |= {self.bos_id: self._settings["bos_token"], self.eos_id: self._settings["eos_token"]}
        special = {index: token for index, token in special.items() if token != self._settings.get("unk_token")}
        for (index, token), ids in zip(special.items(), self.encode_batch(list(special.values())), strict=True):
            if index in ids:
                raise UserError(
                    f"The text {token!r} becomes special token {index} in the tokenizer of `{self.path}`, so that any "
                    'document could forge it. Mark it `"special": true` in the `added_tokens` of tokenizer.json.'
                )


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Load the tokenizer of a checkpoint folder, and prove it against SentencePiece where the folder has its model.

    Args:
        path: Folder with ``tokenizer.json``, ``tokenizer.model`` or both, and ``tokenizer_config.json``.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: No such folder, or it has no tokenizer.
        ValueError: The files are damaged, contradict each other, or cannot be encoded with exactly.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MissingFileError(f"`tokenizer={str(path)!r}` is not a folder. Give the local folder of a checkpoint.")
    fast_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if not fast_file.is_file() and not model_file.is_file():
        raise MissingFileError(
            f"`tokenizer={str(path)!r}` has neither tokenizer.json nor tokenizer.model. "
            "Copy one there from the checkpoint."
        )
    settings = _read_settings(folder, model_file)
    if fast_file.is_file():
        backend = _read_fast_tokenizer(fast_file)
        remedy = "Remove the wrong one of the two: without tokenizer.json, it is rebuilt from tokenizer.model."
    else:
        backend = build_fast_tokenizer(model_file)
        if _model_puts_bos_first(settings) and settings["bos_token"] in backend.get_vocab():
            put_bos_first(backend, settings["bos_token"])
        remedy = "Put the checkpoint's tokenizer.json beside it."
    tokenizer = TextTokenizer(backend, folder, settings)
    if model_file.is_file():
        check_against_sentencepiece(tokenizer.encode_batch, model_file, remedy)
    return tokenizer


def begins_with_bos(folder: Path) -> bool:
    """Tell whether the tokenizer of a folder puts BOS in front of a text, without a check of anything else.

    Args:
        folder: Folder with ``tokenizer.json``, ``tokenizer.model`` or both.

    Raises:
        ValueError: A file is damaged.
    """
    fast_file = folder / "tokenizer.json"
    settings = _read_settings(folder, folder / "tokenizer.model")
    if fast_file.is_file():
        return puts_bos_first(_read_fast_tokenizer(fast_file), settings.get("bos_token"))
    return _model_puts_bos_first(settings)


def _model_puts_bos_first(settings: dict[str, Any]) -> bool:
    """Tell whether BOS comes before a text where ``tokenizer.model`` is alone: Llama's and Mistral's do, unasked."""
    return "bos_token" in settings and bool(settings.get("add_bos_token", True))


def _read_fast_tokenizer(file: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every damage
        raise UserError(f"`{file}` is not a tokenizer.json ({error}). Download it again.") from error


def _read_settings(folder: Path, model_file: Path) -> dict[str, Any]:
    """Read special tokens and chat template; tokenizer_config.json overrides special_tokens_map.json and the model.

    A BOS of null, as Qwen's and OLMoE's, means that documents are apart by EOS: then each begins with it as well.
    """
    settings: dict[str, Any] = special_pieces(model_file) if model_file.is_file() else {}
    has_bos = True
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        read = read_object(folder / name, _SETTINGS)
        settings |= {key: value for key, value in read.items() if value is not None}
        has_bos = read.get("bos_token", has_bos) is not None
    for name in _SPECIAL_NAMES:
        if isinstance(settings.get(name), dict):  # a serialised AddedToken
            settings[name] = settings[name]["content"]
    if not has_bos and "eos_token" in settings:
        settings.setdefault("bos_token", settings["eos_token"])
    template = folder / "chat_template.jinja"
    return settings | ({"chat_template": template.read_text(encoding="utf-8")} if template.is_file() else {})


def _credit_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int32]:
    """Count the bytes of each token by its characters ``[start, stop)``; the last one has what no token reaches."""
    if not offsets:
        return np.zeros(0, dtype=np.int32)
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)
    total = np.concatenate([[0], np.cumsum(widths)])
    reached = np.maximum.accumulate(np.asarray(offsets, dtype=np.int64)[:, 1])
    reached[-1] = len(characters)
    return np.diff(total[reached], prepend=0).astype(np.int32)


BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no character, or not yet


def stream_text(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Decode tokens as they come, never half a character.

    A character may take several tokens. While the text ends in bytes that are none, the rest waits; at the end it
    comes as it is.

    Args:
        tokens: Token ids.
        decode: All ids so far to text.

    Yields:
        Pieces, none empty; joined, they are the text without blanks before its first letter, with which models that
        were not asked to begin an answer.
    """
    ids: list[int] = []
    given, text = 0, ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        start = max(given, len(text) - len(text.lstrip()))
        if start < len(text) and not text.endswith(BROKEN):
            yield text[start:]
            given = len(text)
    if rest := text[given:] if given else text.lstrip():
        yield rest

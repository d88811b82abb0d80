"""Which new pieces go into a tokenizer, and the folder that holds the two together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.atomic import new_folder, write_json
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.text import load_tokenizer
from lightning_mixcn.tokenizer.files import tokenizer_files
from lightning_mixcn.tokenizer.sentencepiece import special_pieces

from .bases import FastBase, SentencePieceBase
from .scripts import ScriptFilter

Unreachable = Literal["drop", "complete"]

REPORT = "vocabulary_extension.json"
_CONFIG = "tokenizer_config.json"
# They load tokenizer.json as it is; others of transformers rebuild it from their own idea of the model.
_AS_IT_STANDS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_REBUILT = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt", _CONFIG)


class TokenizerBase(Protocol):
    """What merging needs of a tokenizer.

    Attributes:
        pieces: Id of each piece that it has.
    """

    pieces: Mapping[str, int]

    def spelled(self, piece: str) -> str:
        """Return a SentencePiece piece as this tokenizer writes it."""

    def helpers(self, pieces: Sequence[str]) -> list[str]:
        """Return pieces without which some of ``pieces`` are out of reach."""

    def reached(self, pieces: Sequence[str]) -> list[bool]:
        """Tell of each piece whether the tokenizer, extended with all of them, makes it of its own text."""

    def write(self, folder: Path, pieces: Sequence[str]) -> None:
        """Write ``tokenizer.json``, and ``tokenizer.model`` where the base has one, with these further pieces."""


@dataclass(frozen=True)
class ChosenPieces:
    """What became of each candidate.

    Args:
        candidates: Number of given pieces.
        already_there: Those that the base has, or that came twice.
        other_script: Those with characters of another script.
        unreachable: Those that merges never arrive at, dropped.
        beyond_max: Those beyond the number wanted, dropped.
        helpers: Beginnings of pieces or of characters, added for the sake of these.
        added: New pieces in the order of their ids, helpers last, as the tokenizer writes them.
    """

    candidates: int
    already_there: int
    other_script: int
    unreachable: list[str]
    beyond_max: int
    helpers: list[str]
    added: list[str]


def mergeable_base(folder: Path) -> TokenizerBase:
    """Open the tokenizer of a folder: SentencePiece's model if there is one, else ``tokenizer.json``.

    Raises:
        FileNotFoundError: it has neither.
        ValueError: it is no BPE.
    """
    if (folder / "tokenizer.model").is_file():
        return SentencePieceBase(folder)
    if (folder / "tokenizer.json").is_file():
        return FastBase(folder)
    raise MissingFileError(
        f"`base_tokenizer={str(folder)!r}` has neither tokenizer.model nor tokenizer.json. Give the folder of a "
        "checkpoint or tokenizer"
    )


def choose_pieces(
    base: TokenizerBase,
    candidates: Sequence[str],
    script: ScriptFilter,
    *,
    max_pieces: int | None = None,
    unreachable: Unreachable = "drop",
) -> ChosenPieces:
    """Leave out what is there, of another script, out of reach, or too much.

    Args:
        base: The tokenizer.
        candidates: SentencePiece pieces, the most wanted first.
        script: Filter of the characters that a new piece may have.
        max_pieces: Most new pieces; ``None`` for all.
        unreachable: Treatment of pieces that merges do not arrive at.

    Raises:
        ValueError: nothing is left.
    """
    of_script = [piece for piece in candidates if script.covers(piece)]
    spelled = {base.spelled(piece): piece for piece in of_script}
    wanted = [piece for piece in spelled if piece not in base.pieces]
    there, dropped, beyond = len(of_script) - len(wanted), list[str](), 0
    beginnings = _beginnings(base, wanted, spelled) if unreachable == "complete" else []
    while wanted:
        known = {*base.pieces, *wanted}
        needed = dict.fromkeys([*beginnings, *base.helpers([*wanted, *beginnings])])
        helpers = [piece for piece in needed if piece not in known]
        flags = base.reached([*wanted, *helpers])[: len(wanted)]
        # What is never reached takes no part in any merge, so dropping it changes nothing; its helpers may go too.
        dropped += [spelled[piece] for piece, reached in zip(wanted, flags, strict=True) if not reached]
        wanted = [piece for piece, reached in zip(wanted, flags, strict=True) if reached]
        room = len(wanted) if max_pieces is None else max(max_pieces - len(helpers), 0)
        excess = len(wanted) > room
        if excess:
            kept = _first(wanted, spelled, room)
            beyond, wanted = beyond + len(wanted) - len(kept), kept
        if all(flags) and not excess:
            break
    if not wanted:
        raise UserError(
            f"`pieces` has nothing new: of {len(candidates)} pieces {len(candidates) - len(of_script)} are of another "
            f"script, {there} in the base already, {len(dropped)} out of reach of its merges. Train others with "
            "`mixcn vocab train`, or give another `--script`"
        )
    left_out = len(candidates) - len(of_script)
    return ChosenPieces(len(candidates), there, left_out, dropped, beyond, helpers, [*wanted, *helpers])


def _first(wanted: Sequence[str], spelled: Mapping[str, str], room: int) -> list[str]:
    """Return the first pieces, and the single characters that they are made of, which a BPE's file has last."""
    characters = {spelled[piece]: piece for piece in wanted if len(spelled[piece]) == 1}
    kept: dict[str, None] = {}
    for piece in wanted:
        parts = dict.fromkeys([*(characters[part] for part in spelled[piece] if part in characters), piece])
        if len(kept | parts) > room:
            break
        kept |= parts
    return [piece for piece in wanted if piece in kept]


def _beginnings(base: TokenizerBase, wanted: Sequence[str], spelled: Mapping[str, str]) -> list[str]:
    """Return the beginnings, of two characters and more, of pieces that are out of reach as things are."""
    flags = base.reached([*wanted, *base.helpers(wanted)])[: len(wanted)]
    pieces = [spelled[piece] for piece, reached in zip(wanted, flags, strict=True) if not reached]
    found = (base.spelled(piece[:size]) for piece in pieces for size in range(2, len(piece)))
    return list(dict.fromkeys(found))


def write_tokenizer(base_folder: Path, base: TokenizerBase, chosen: ChosenPieces, script: str, out: Path) -> None:
    """Write the extended tokenizer's folder, once it is proved to load and to equal SentencePiece.

    Args:
        base_folder: Folder of the base's tokenizer; its configuration and chat template are copied.
        base: The tokenizer.
        chosen: The new pieces.
        script: Name of the filter, for the report.
        out: Folder to make.

    Raises:
        FileExistsError: it is there.
        ValueError: the fast tokenizer differs from SentencePiece's.
    """
    with new_folder(out) as folder:
        base.write(folder, chosen.added)
        for file in tokenizer_files(base_folder):
            if file.name not in _REBUILT:
                (folder / file.name).write_bytes(file.read_bytes())
        write_json(folder / _CONFIG, _configuration(base_folder), indent=1)
        report = {"base_pieces": len(base.pieces), "pieces": len(base.pieces) + len(chosen.added), "script": script}
        counts = {
            "candidates": chosen.candidates, "already_there": chosen.already_there,
            "other_script": chosen.other_script, "beyond_max": chosen.beyond_max, "added": len(chosen.added),
            "helpers": len(chosen.helpers), "unreachable": chosen.unreachable,
        }  # fmt: skip
        write_json(folder / REPORT, report | counts, indent=1)
        load_tokenizer(folder)


def _configuration(base_folder: Path) -> dict[str, Any]:
    file = base_folder / _CONFIG
    settings = read_object(file) if file.is_file() else {}
    if (base_folder / "tokenizer.model").is_file():
        settings = special_pieces(base_folder / "tokenizer.model") | settings
    if settings.get("tokenizer_class") not in _AS_IT_STANDS:
        settings["tokenizer_class"] = _AS_IT_STANDS[0]
    return settings

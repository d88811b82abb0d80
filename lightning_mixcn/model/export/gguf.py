"""Write GGUF through llama.cpp's own programs, which are called, not copied."""

import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.atomic import new_file, scratch_folder, write_json
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.model.architectures import architecture_of
from lightning_mixcn.model.checkpoints.reading import model_config
from lightning_mixcn.model.find import ModelSource
from lightning_mixcn.tokenizer.begin import take_out_bos
from lightning_mixcn.tokenizer.pieces import TokenizerPieces
from lightning_mixcn.tokenizer.tokenizer import begins_with_bos

from .card import public_title
from .folder import ExportOptions, export_checkpoint
from .instruct import pieces_folder

CONVERTER = "convert_hf_to_gguf.py"
QUANTIZER = "llama-quantize"
# What the converter writes itself; other types are llama-quantize's, from 16 bits.
CONVERTED_TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")
# GGUF's name for whether BOS comes before a text.
ADD_BOS = "tokenizer.ggml.add_bos_token"
_BOOL = 7  # GGUF's number of the type
_STDERR = 2


def export_gguf(found: ModelSource, out: Path, options: ExportOptions) -> None:
    """Write a GGUF file of the merged model through llama.cpp. See `export`."""
    converter = LlamaCpp(options.llama_cpp, options.outtype or "auto")
    if options.dtype is None and converter.is_finer_than_bfloat16:
        options = replace(options, dtype="float32")
    check_built_in(model_config(found.base))
    instruct = options.instruct_delta
    check_tokenizer(found.tokenizer if instruct is None else pieces_folder(instruct, found.tokenizer))
    title = public_title(found, changed=instruct is not None)
    converter.write(out, title, lambda folder: export_checkpoint(found, folder, options))


class LlamaCpp:
    """The programs of a llama.cpp checkout.

    Args:
        folder: The checkout; ``None`` takes the environment's ``LLAMA_CPP``, and then what is on the ``PATH``.
        outtype: llama.cpp's name of a type, e.g. ``bf16``, ``q8_0`` or ``q4_k_m``.

    Raises:
        FileNotFoundError: a program that this type needs is not there.
    """

    def __init__(self, folder: str | None, outtype: str) -> None:
        """Find the programs."""
        self._outtype = outtype.lower()
        self._converter = _find(folder, CONVERTER)
        self._quantizer = None if self._outtype in CONVERTED_TYPES else _find(folder, QUANTIZER)

    @property
    def is_finer_than_bfloat16(self) -> bool:
        """Whether the file holds digits of a weight that bfloat16 would have rounded off."""
        return self._outtype in ("f32", "f16")

    def write(self, out: Path, name: str, export: Callable[[Path], None]) -> None:
        """Write a GGUF file; nothing is left under its name, or beside it, unless it is whole.

        Args:
            out: The file to make.
            name: Name of the model. The converter makes ``general.name`` and its like of the folder's name.
            export: Writes the merged Hugging Face folder to the path it is given, below one beside ``out``.

        Raises:
            FileExistsError: ``out`` is there.
            ValueError: a program failed.
            OSError: the disk is full.
        """
        with new_file(out) as finished, scratch_folder(out.with_name(f"{out.name}.merged")) as scratch:
            merged = scratch / name
            export(merged)
            begins = begins_with_bos(merged)
            self._prepare_tokenizer(merged, begins, scratch / "vocabulary.gguf")
            converted = finished if self._quantizer is None else scratch / "converted.gguf"
            kind = self._outtype if self._quantizer is None else "bf16"
            _call(self._converter, [str(merged), "--outfile", str(converted), "--outtype", kind], converted)
            _state_bos(converted, begins)
            if self._quantizer is not None:
                _call(self._quantizer, [str(converted), str(finished), self._outtype.upper()], finished)

    def _prepare_tokenizer(self, merged: Path, begins: bool, scratch: Path) -> None:
        """Let the converter learn whether BOS comes before a text, and know the tokenizer.

        It knows byte-level ones by a hash of the ids of a fixed text: of most published ones without BOS, of Llama 3's
        with it. So BOS stays in the folder's ``tokenizer.json`` only where the converter knows it so.

        Args:
            merged: Folder that will be converted.
            begins: Whether the tokenizer puts BOS before a text.
            scratch: File that may be written.
        """
        settings = merged / "tokenizer_config.json"
        content = read_object(settings) if settings.is_file() else {}
        write_json(settings, content | {"add_bos_token": begins})
        if begins and not (merged / "tokenizer.model").is_file():
            command = _command(self._converter, [str(merged), "--outfile", str(scratch), "--vocab-only"])
            quiet = subprocess.DEVNULL
            if subprocess.run(command, stdout=quiet, stderr=quiet).returncode != 0:
                take_out_bos(merged / "tokenizer.json")


def _state_bos(file: Path, begins: bool) -> None:
    """Have a GGUF file say whether BOS comes before a text.

    The converter writes it as the tokenizer's settings have it, but false for each vocabulary of 49,152 pieces, as
    Granite's: SmolLM2's is of that size, too. The byte is changed in its place. The package gguf, which the converter
    brings with it, need not be installed here.

    Raises:
        ValueError: the converter did not write it.
    """
    name = ADD_BOS.encode()
    key = struct.pack("<Q", len(name)) + name + struct.pack("<I", _BOOL)
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as content:
        place = content.find(key)
        if place >= 0:
            content[place + len(key)] = begins
        elif content[:4] == b"GGUF":
            raise UserError(
                f"llama.cpp's {CONVERTER} wrote no {ADD_BOS}, so that llama.cpp might put another token before a text "
                "than was trained. Use a newer checkout of llama.cpp, or export with `--format hf`"
            )


def _find(folder: str | None, program: str) -> Path:
    """Find a program in the checkout, where its build puts it, or on the ``PATH``."""
    given = folder or os.environ.get("LLAMA_CPP")
    if given is not None:
        places = [Path(given).expanduser() / part / program for part in ("", "build/bin", "bin")]
    else:
        places = [Path(path) / program for path in os.get_exec_path()]
    for place in places:
        if place.is_file():
            return place
    where = f"in {given!r}" if given is not None else "on the PATH"
    raise MissingFileError(
        f"llama.cpp's {program} is not {where}. Give a checkout of github.com/ggml-org/llama.cpp with `--llama_cpp "
        "FOLDER` (or the environment variable LLAMA_CPP), or export with `--format hf` and convert elsewhere"
    )


def check_built_in(config: PreTrainedConfig) -> None:
    """Refuse a model that llama.cpp would load and compute otherwise, or not load at all.

    Raises:
        ValueError: a setting is not the one that llama.cpp has built in for the family.
    """
    architecture = architecture_of(config)
    for key, value in architecture.llama_cpp.items():
        if getattr(config, key, value) != value:
            raise UserError(
                f"the model has {key}={getattr(config, key)!r}, but llama.cpp computes every {architecture.title} with "
                f"{key}={value!r}. Export with `--format hf`"
            )


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer that the converter gets wrong: SentencePiece's pieces out of ``tokenizer.json`` alone.

    Byte-level pieces (GPT-2's kind) it takes from there.

    Args:
        folder: Folder of the tokenizer.

    Raises:
        ValueError: there is no ``tokenizer.model``, and the pieces are not byte-level.
    """
    if not (folder / "tokenizer.model").is_file() and not TokenizerPieces(folder).is_byte_level:
        raise UserError(
            "the model has no tokenizer.model, without which llama.cpp's converter writes a tokenizer that splits text "
            "differently. Put the SentencePiece file beside the tokenizer.json of the base or adapter"
        )


def _command(program: Path, arguments: list[str]) -> list[str]:
    return [*([sys.executable] if program.suffix == ".py" else []), str(program), *arguments]


def _call(program: Path, arguments: list[str], output: Path) -> None:
    """Run one program, with its messages on our stderr as they come; it must write its output."""
    code = subprocess.run(_command(program, arguments), stdout=_STDERR).returncode
    if code != 0 or not output.is_file():
        raise UserError(
            f"llama.cpp's {program.name} ended with code {code} and no file; its last lines above say why. If they say "
            "that the BPE pre-tokenizer was not recognized (new pieces change its hash), enter the printed chkhsh in "
            "the converter's get_vocab_base_pre, with the name that the base's has there. Otherwise: is this version "
            "made for this model, and are the packages in its requirements installed?"
        )

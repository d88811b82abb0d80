"""Pieces and their splits, from either file, against SentencePiece."""

import shutil
from pathlib import Path

import pytest
import sentencepiece

from lightning_mixcn.tokenizer.pieces import TokenizerPieces, has_tokenizer

MIXTRAL = Path(__file__).parents[2].parent / "shared/data/tokenizers/mixtral-8x7b"


@pytest.fixture
def mixtral() -> Path:
    if not MIXTRAL.is_dir():
        pytest.skip("Mixtral's tokenizer lies outside the project and is not here")
    return MIXTRAL


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_either_file_splits_as_sentencepiece_does(mixtral: Path, tmp_path: Path, name: str) -> None:
    shutil.copyfile(mixtral / name, tmp_path / name)
    pieces = TokenizerPieces(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(mixtral / "tokenizer.model"))
    assert pieces.pieces == [reference.id_to_piece(index) for index in range(32_000)]
    for text in ("中国人民", "привет", "𠮷野家", "hello"):
        # SentencePiece puts a visible blank in front of a text; a piece has it or has it not.
        assert pieces.split(f"▁{text}") == reference.encode(text)
    assert [pieces.pieces[index] for index in pieces.split("好中")] == ["好", "中"]
    sizes = {piece: pieces.num_bytes(reference.piece_to_id(piece)) for piece in ("▁the", "中", "<0xE4>", "é")}
    assert sizes == {"▁the": 4, "中": 3, "<0xE4>": 1, "é": 2}


def test_bytes_of_a_byte_level_tokenizer(tiny_base: Path) -> None:
    pieces = TokenizerPieces(tiny_base)
    assert len(pieces) == 259
    assert pieces.is_byte_level
    assert [pieces.num_bytes(index) for index in pieces.split("ä¸Ń")] == [1, 1, 1]  # 中 in GPT-2's alphabet


def test_broken_files_are_named(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor tokenizer.model"):
        TokenizerPieces(tmp_path)
    for name, kind in (("tokenizer.model", "SentencePiece model"), ("tokenizer.json", "tokenizer.json")):
        (tmp_path / name).write_bytes(b"\x08\xff nonsense")
        with pytest.raises(ValueError, match=f"is not a {kind}"):
            TokenizerPieces(tmp_path)

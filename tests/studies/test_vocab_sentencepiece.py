"""What cannot be a base, and the scores of new pieces."""

from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from lightning_mixcn.studies.vocabulary.bases import SentencePieceBase
from lightning_mixcn.studies.vocabulary.training import train_pieces
from lightning_mixcn.text import load_tokenizer
from tests.studies.vocab_data import small_base


def test_scores_descend_below_the_old_ones(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    (tmp_path / "out").mkdir()
    SentencePieceBase(base).write(tmp_path / "out", ["甲", "甲乙"])
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time by protobuf
    proto.ParseFromString((tmp_path / "out/tokenizer.model").read_bytes())
    ordinary = [piece.score for piece in proto.pieces[:-2] if piece.type == 1 and set(piece.piece) != {"▁"}]
    assert min(ordinary) > proto.pieces[-2].score > proto.pieces[-1].score
    assert proto.trainer_spec.vocab_size == len(proto.pieces) == 372


def test_a_unigram_base_is_refused(tmp_path: Path) -> None:
    lines = iter(["привет мир город книга"] * 10)
    model = train_pieces(
        lines, vocab_size=18, model_type="unigram", character_coverage=1.0, max_piece_characters=8, max_sentences=0,
        seed=0,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(ValueError, match=r"is no BPE model. Pieces can be merged into a BPE only"):
        SentencePieceBase(tmp_path)


def test_a_base_whose_files_differ_is_refused(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    tokenizer = load_tokenizer(base).hf
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(ValueError, match=r"tokenizer.json has other pieces than tokenizer.model. Remove one"):
        SentencePieceBase(base)

"""Extended tokenizers that tests share, made of a few words as `mixcn vocab` makes them of a corpus."""

import contextlib
import io
import json
import random
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lightning_mixcn.studies.vocabulary.command import merge
from lightning_mixcn.studies.vocabulary.training import train_pieces

HAN = re.findall("..", "今天天气中国北京学生学习语言模型我们可以大家一起看书电视新闻报道经济发展")
CYRILLIC = re.findall(r"\w+", "привет мир сегодня хорошая погода книга читать люди город новый язык учить слово дом")
TALES = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "One day, Tom saw a big dog. The dog was very happy and wanted to play with the ball.",
    "The sun was hot. Mom said they should go home and eat some cake. They were all very happy.",
    "A small bird sat in a tree. It was sad because it could not find its mom. Then a boy came to help.",
    "Lily and her mom went to the park. They saw a big tree and a little bird. Lily was very happy.",
    "Tom had a red ball. He wanted to play with his friend. They played in the park all day.",
)


def write_pieces(file: Path, words: list[str], vocab_size: int, between: str = "") -> Path:
    """Train BPE pieces on random sequences of words."""
    draw = random.Random(0)
    lines = (between.join(draw.choices(words, k=12)) for _ in range(400))
    model = train_pieces(
        lines, vocab_size=vocab_size, model_type="bpe", character_coverage=1.0, max_piece_characters=16,
        max_sentences=0, seed=0,
    )  # fmt: skip
    file.write_bytes(model)
    return file


# Qwen's own (tokenizer.json of Qwen3): letters with at most one other character in front, digits one by one.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def qwen_like(folder: Path, pieces: int = 300) -> Path:
    """Make a tokenizer as Qwen3's is, but small: pieces of bytes, and beyond them tokens that the model lacks."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=pieces, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*TALES, "中国人民的中国"] * 3, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in QWEN_ADDED[:3]])
    backend.add_tokens([AddedToken(token, special=False) for token in QWEN_ADDED[3:]])
    assert [backend.token_to_id(token) for token in QWEN_ADDED] == list(range(pieces, pieces + len(QWEN_ADDED)))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        backend.token_to_id(token): {"content": token, "special": token in QWEN_ADDED[:3]} | flags
        for token in QWEN_ADDED
    }
    settings = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": decoder, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": list(QWEN_ADDED[1:3]), "errors": "replace",
        "clean_up_tokenization_spaces": False, "model_max_length": 131072,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def extend(base: Path, out: Path, words: list[str], vocab_size: int, *, script: str = "Han", between: str = "") -> Path:
    """Make a tokenizer's folder with pieces of some words merged in."""
    pieces = write_pieces(out.with_suffix(".model"), words, vocab_size, between)
    with contextlib.redirect_stdout(io.StringIO()):
        merge(str(base), str(pieces), out=str(out), script=script)
    return out

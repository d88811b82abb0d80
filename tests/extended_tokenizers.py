"""Extended tokenizers that tests share, made of a few words as `mixcn vocab` makes them of a corpus."""

import contextlib
import io
import random
import re
from pathlib import Path

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


def extend(base: Path, out: Path, words: list[str], vocab_size: int, *, script: str = "Han", between: str = "") -> Path:
    """Make a tokenizer's folder with pieces of some words merged in."""
    pieces = write_pieces(out.with_suffix(".model"), words, vocab_size, between)
    with contextlib.redirect_stdout(io.StringIO()):
        merge(str(base), str(pieces), out=str(out), script=script)
    return out

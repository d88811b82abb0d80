"""Real tokenizers and texts of the vocabulary's tests, and small ones that SentencePiece itself trains."""

import gzip
import io
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
WORDS = re.findall(
    r"\S+", "the of and to in a is that for it 的 一 是 不 了 在 人 有 我 他 这 中 大 def self == 12 345 ,。 !"
)


def shared(*parts: str) -> Path:
    """Return a file or folder of the real data; skip where it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} lies outside the project and is not here")
    return path


def small_base(folder: Path) -> Path:
    """Make a tokenizer as Mixtral's is, but small."""
    folder.mkdir()
    draw, model = random.Random(1), io.BytesIO()
    lines = [" ".join(draw.choices(WORDS, k=8)) for _ in range(400)] + ["    x  y   z"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=370, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def english_and_code(least: int) -> list[str]:
    """Real lines of English prose and of Python; those with Chinese in them, as prompts of the demo, are left out."""
    lines = shared("corpora", "en", "wikitext2_test.txt").read_text(encoding="utf-8").splitlines()
    lines += shared("corpora", "en", "tinyshakespeare.txt").read_text(encoding="utf-8").splitlines()[:4000]
    sources = [*Path(__file__).parents[3].glob("lightning_mixcn/**/*.py"), *Path(json.__file__).parents[1].glob("*.py")]
    code = itertools.chain.from_iterable(file.read_text(encoding="utf-8").splitlines() for file in sorted(sources))
    lines += itertools.islice(code, 8000)
    lines = [line for line in lines if line and not re.search("[\u4e00-\u9fff]", line)]
    assert len(lines) >= least
    return lines


def simplified_paragraphs() -> list[str]:
    """Paragraphs of the Chinese Wikipedia in simplified characters, those that the merged pieces were made for."""
    file = shared("corpora", "zh", "wikipedia_paragraphs.jsonl.gz")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        records = (json.loads(line) for line in lines)
        texts = (record["text"] for record in records if record["script"] == "Hans")
        return list(texts)

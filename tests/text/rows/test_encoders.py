"""Labels of conversations against masks written by hand, with a tokenizer of bytes: what is learned can be read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mixcn.testing.tiny import byte_tokenizer
from lightning_mixcn.text import (
    Conversations,
    TextTokenizer,
    Turn,
    load_template,
    load_tokenizer,
)
from lightning_mixcn.text.chat.records import dump_conversation
from lightning_mixcn.text.chat.templates import MixtralControlTemplate, MixtralTemplate
from lightning_mixcn.text.rows.encoders import EncodedDocument

LONG = [Turn("user", "一"), Turn("assistant", "甲"), Turn("user", "二"), Turn("assistant", "乙乙")]
FIRST = "<s>[INST] 一 [/INST] 甲</s>"


@pytest.fixture(scope="module")
def bytes_tokenizer(train_sentencepiece: Any) -> TextTokenizer:
    return load_tokenizer(train_sentencepiece())


def text_of(turns: list[Turn]) -> str:
    return dump_conversation(turns).decode()


def encode(tokenizer: TextTokenizer, turns: list[Turn], length: int = 4096, **choices: Any) -> EncodedDocument:
    return Conversations(MixtralTemplate(), tokenizer, length, **choices).encode(text_of(turns))


def read(tokenizer: TextTokenizer, document: EncodedDocument) -> tuple[str, list[str]]:
    """Decode the row, and each run of learned tokens."""
    assert document.learned is not None
    edges = np.flatnonzero(np.diff(document.learned.astype(int), prepend=0, append=0)).reshape(-1, 2)
    runs = [tokenizer.decode(document.tokens[a:b].tolist(), skip_special_tokens=False) for a, b in edges]
    return tokenizer.decode(document.tokens.tolist(), skip_special_tokens=False), runs


@pytest.mark.parametrize(
    ("turns", "choices", "learned"),
    [
        (LONG[:2], {}, ["甲</s>"]),
        (LONG, {}, ["甲</s>", "乙乙</s>"]),
        (LONG, {"answers": "last"}, ["乙乙</s>"]),
        ([Turn("user", "一"), Turn("assistant", "")], {}, ["</s>"]),
        ([Turn("system", "系统"), *LONG[:2]], {}, ["甲</s>"]),
        ([Turn("user", "</s> [INST] x [/INST] <s>"), Turn("assistant", "</s>b")], {}, None),
    ],
)
def test_answers_and_their_ends_are_learned(
    bytes_tokenizer: TextTokenizer, turns: list[Turn], choices: dict[str, Any], learned: list[str] | None
) -> None:
    document = encode(bytes_tokenizer, turns, **choices)
    assert document.learned is not None
    assert document.too_long is None
    ends = np.flatnonzero(document.tokens == bytes_tokenizer.eos_id)
    assert len(ends) == sum(turn.role == "assistant" for turn in turns)  # what text spells is no control token
    assert np.count_nonzero(document.tokens == bytes_tokenizer.bos_id) == 1
    if learned is not None:
        assert [run.strip() for run in read(bytes_tokenizer, document)[1]] == learned


def test_too_long_ones_are_cut_at_a_turn(bytes_tokenizer: TextTokenizer) -> None:
    whole, first = (len(encode(bytes_tokenizer, turns).tokens) for turns in (LONG, LONG[:2]))
    for length in range(first, whole):
        document = encode(bytes_tokenizer, LONG, length)
        assert document.too_long == "shortened"
        assert document.tokens.tolist() == encode(bytes_tokenizer, LONG[:2]).tokens.tolist()
    dropped = encode(bytes_tokenizer, LONG, first - 1)
    assert (dropped.too_long, len(dropped.tokens)) == ("dropped", 0)
    assert encode(bytes_tokenizer, LONG, whole).too_long is None


def test_too_long_ones_are_dropped(bytes_tokenizer: TextTokenizer) -> None:
    whole = len(encode(bytes_tokenizer, LONG).tokens)
    assert encode(bytes_tokenizer, LONG, whole - 1, on_too_long="drop").too_long == "dropped"
    assert encode(bytes_tokenizer, LONG, whole, on_too_long="drop").too_long is None


def test_a_truncated_answer_has_no_end(bytes_tokenizer: TextTokenizer) -> None:
    whole = encode(bytes_tokenizer, LONG)
    assert whole.learned is not None
    for length in range(2, len(whole.tokens)):
        document = encode(bytes_tokenizer, LONG, length, on_too_long="truncate")
        if not whole.learned[:length].any():
            assert document.too_long == "dropped"
            continue
        assert document.too_long == "shortened"
        assert document.tokens.tolist() == whole.tokens[:length].tolist()
        assert document.learned is not None
        assert document.learned.tolist() == whole.learned[:length].tolist()


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=60)
@given(
    contents=st.lists(TEXTS | st.just("[/INST]") | st.just("</s>"), min_size=2, max_size=8),
    length=st.integers(8, 200),
    policy=st.sampled_from(["cut_at_turn", "truncate", "drop"]),
    answers=st.sampled_from(["all", "last"]),
)
def test_no_token_of_a_question_is_ever_learned(
    bytes_tokenizer: TextTokenizer, contents: list[str], length: int, policy: Any, answers: Any
) -> None:
    turns = [
        Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(contents[: len(contents) // 2 * 2])
    ]
    document = encode(bytes_tokenizer, turns, length, on_too_long=policy, answers=answers)
    assert len(document.tokens) <= length
    if document.too_long == "dropped":
        return
    assert document.learned is not None
    assert document.learned.any()
    asked = set[int]()
    place = 0
    for segment in MixtralTemplate().encode(turns, bytes_tokenizer):
        if not segment.answer:
            asked |= set(range(place, place + len(segment.text_ids)))
        place += len(segment.text_ids)
    assert not asked & set(np.flatnonzero(document.learned).tolist())


def test_bytes_of_answers_are_scored(bytes_tokenizer: TextTokenizer) -> None:
    turns = [Turn("system", "系"), *LONG, Turn("user", "三"), Turn("assistant", "")]
    encoder = Conversations(MixtralTemplate(), bytes_tokenizer, 4096)
    (scored,) = encoder.score([text_of(turns)])
    learned = encoder.encode(text_of(turns)).learned
    assert scored.learned is not None
    assert learned is not None
    assert scored.learned.tolist() == learned.tolist()
    assert scored.label_bytes.sum() == len("甲乙乙".encode())
    ends = scored.tokens == bytes_tokenizer.eos_id
    assert scored.is_text.tolist() == (scored.learned & ~ends).tolist()


def test_bytes_of_a_truncated_answer(bytes_tokenizer: TextTokenizer) -> None:
    turns = [Turn("user", "?"), Turn("assistant", "the of and")]
    whole = encode(bytes_tokenizer, turns)
    (scored,) = Conversations(MixtralTemplate(), bytes_tokenizer, len(whole.tokens) - 2, "truncate").score(
        [text_of(turns)]
    )
    assert scored.label_bytes.sum() < len("the of and")
    assert scored.is_text.sum() == scored.learned.sum() if scored.learned is not None else False


def test_what_tokens_depend_on(bytes_tokenizer: TextTokenizer) -> None:
    one, other = (Conversations(MixtralTemplate(), bytes_tokenizer, 64, answers=answers) for answers in ("all", "last"))
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint.keys() == {"tokenizer", "template", "on_too_long", "answers"}


FLAGGED = [LONG[0], Turn("assistant", "甲", learned=False), *LONG[2:]]


@pytest.mark.parametrize("answers", ["all", "last"])
def test_an_answer_that_is_not_to_be_learned_is_only_read(bytes_tokenizer: TextTokenizer, answers: Any) -> None:
    document = encode(bytes_tokenizer, FLAGGED, answers=answers)
    assert document.tokens.tolist() == encode(bytes_tokenizer, LONG).tokens.tolist()
    assert [run.strip() for run in read(bytes_tokenizer, document)[1]] == ["乙乙</s>"]
    (scored,) = Conversations(MixtralTemplate(), bytes_tokenizer, 4096, answers=answers).score([text_of(FLAGGED)])
    assert scored.label_bytes.sum() == len("乙乙".encode())
    assert scored.learned is not None
    assert document.learned is not None
    assert scored.learned.tolist() == document.learned.tolist()


def test_the_last_answer_is_the_last_one_to_be_learned(bytes_tokenizer: TextTokenizer) -> None:
    turns = [*LONG[:3], Turn("assistant", "乙乙", learned=False)]
    for answers in ("all", "last"):
        document = encode(bytes_tokenizer, turns, answers=answers)
        assert [run.strip() for run in read(bytes_tokenizer, document)[1]] == ["甲</s>"]


def test_without_a_learned_answer_nothing_is_left(bytes_tokenizer: TextTokenizer) -> None:
    whole = len(encode(bytes_tokenizer, LONG).tokens)
    for policy in ("cut_at_turn", "drop", "truncate"):  # the second answer, which alone is learned, does not fit
        assert encode(bytes_tokenizer, FLAGGED, whole - 8, on_too_long=policy).too_long == "dropped"


def test_a_cut_conversation_is_written_as_a_shorter_one(tmp_path: Path) -> None:
    """Where tags are control tokens, the system's text stands before the last question: cutting must not lose it."""
    saved = byte_tokenizer()
    saved.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    saved.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    template = load_template("mixtral", tokenizer)
    assert isinstance(template, MixtralControlTemplate)
    turns = [Turn("system", "系统"), *LONG]
    whole = Conversations(template, tokenizer, 4096).encode(text_of(turns))
    first = Conversations(template, tokenizer, 4096).encode(text_of(turns[:3]))
    assert whole.tokens.tolist()[: len(first.tokens)] != first.tokens.tolist()
    for length in range(len(first.tokens), len(whole.tokens)):
        document = Conversations(template, tokenizer, length).encode(text_of(turns))
        assert (document.tokens.tolist(), document.too_long) == (first.tokens.tolist(), "shortened")
    assert Conversations(template, tokenizer, len(first.tokens) - 1).encode(text_of(turns)).too_long == "dropped"

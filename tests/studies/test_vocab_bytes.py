"""The alphabet of bytes against the one of the `tokenizers` library."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from lightning_mixcn.studies.vocabulary.bases import (
    BYTES,
    as_bytes,
    is_character,
    is_partial,
)


@given(text=st.text(st.characters(codec="utf-8")))
def test_text_is_spelled_as_the_library_spells_it(text: str) -> None:
    spelled = as_bytes(text)
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert spelled == "".join(part for part, _ in theirs)
    assert decoders.ByteLevel().decode([spelled]) == text
    assert not is_partial(spelled)
    assert is_character(spelled) == (len(text) == 1)


def test_every_byte_has_a_character() -> None:
    assert set(BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTES.values()) == list(range(256))
    assert [is_partial(piece) for piece in (as_bytes("中")[:2], as_bytes("中")[1:], "Ġa", "中")] == [
        True, True, False, False,
    ]  # fmt: skip

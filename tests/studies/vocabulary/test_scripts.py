"""Scripts against the property of the `regex` package, where it is there."""

import pytest

from lightning_mixcn.studies.vocabulary.scripts import ScriptFilter


@pytest.mark.parametrize("script", ["Han", "Cyrillic", "Greek", "Hangul", "Thai", "Hebrew", "Devanagari", "Hiragana"])
def test_letters_are_those_of_unicodes_property(script: str) -> None:
    regex = pytest.importorskip("regex", reason="it comes with transformers")
    keeps, letter = ScriptFilter(script), regex.compile(rf"\p{{Script={script}}}")
    letters = [chr(code) for code in range(0x10000) if regex.match(r"\p{L}", chr(code))]
    theirs = {character for character in letters if letter.match(character)}
    ours = {character for character in letters if character in keeps}
    # Unicode's tables of the two packages are of different years; signs and half-width forms have other names.
    assert len(ours & theirs) > 0.97 * len(theirs)
    assert len(ours - theirs) < 0.03 * len(theirs)


def test_what_is_covered() -> None:
    han = ScriptFilter("Han")
    assert [han.covers(piece) for piece in ("中国", "▁中国", "〇", "中国a", "，", "▁", "ひ", "", "中▁国")] == [
        True, True, True, False, False, False, False, False, False,
    ]  # fmt: skip
    assert ScriptFilter("Hiragana+ katakana +Han").covers("日本ひラ")
    assert ScriptFilter("any").covers("a中，")


@pytest.mark.parametrize("script", ["Klingon", "", "Han+", "Digit", "FULLWIDTH", "any+Han"])
def test_unknown_scripts_are_refused(script: str) -> None:
    with pytest.raises(ValueError, match=r"Unicode has no script .* Give names such as Han"):
        ScriptFilter(script)

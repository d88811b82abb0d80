"""Cards of a base or an adapter whose own README has an odd header."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import metadata_load

from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.export.card import Training, adapter_card
from lightning_mixcn.model.export.command import export
from lightning_mixcn.testing import save_tiny_mixtral
from tests.model.adapters_on_disk import save_adapter

UNREADABLE = {
    "not YAML": "---\nlicense: [mit\nlanguage: {\n---\nA base.",
    "tab": "---\nlicense:\tmit\n\t- x\n---\nA base.",
    "colon": "---\ntitle: a: b: c\n---\nA base.",
    "a list": "---\n- mit\n---\nA base.",
    "a word": "---\nmit\n---\nA base.",
    "unclosed": "---\nlicense: mit\nA base.",
}


def header_of(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def card_on(folder: Path, readme: bytes) -> str:
    base = save_tiny_mixtral(folder / "base")
    (base / "README.md").write_bytes(readme)
    return adapter_card(Training(Checkpoint(base), 7, "none", "float32"), {})


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_header_of_the_base_is_no_metadata(name: str, tmp_path: Path) -> None:
    text = card_on(tmp_path, UNREADABLE[name].encode())
    assert "license" not in header_of(text)
    assert "License: that of the base, which its files here do not state." in text


def test_a_readme_in_another_encoding_is_no_metadata(tmp_path: Path) -> None:
    assert "License: that of the base" in card_on(tmp_path, "---\nlicense: mit\n---\n许可".encode("gb18030"))


@pytest.mark.parametrize("value", ["[mit, apache-2.0]", "{name: mit}", "null", "2.0", "true"])
def test_a_license_that_is_no_name_is_left_out(value: str, tmp_path: Path) -> None:
    text = card_on(tmp_path, f"---\nlicense: {value}\nlicense_name: x\n---\nA base.".encode())
    assert not {"license", "license_name"} & header_of(text).keys()
    assert "License: that of the base, which its files here do not state." in text


def test_a_license_s_fields_are_text_or_left_out(tmp_path: Path) -> None:
    header = header_of(card_on(tmp_path, b"---\nlicense: other\nlicense_name: mine\nlicense_link: [a, b]\n---\n"))
    assert (header["license"], header["license_name"], header.get("license_link")) == ("other", "mine", None)


@pytest.mark.parametrize(
    ("value", "expected"), [("zh", ["zh"]), ("[zh, en, zh]", ["zh", "en"]), ("[zh, no, 3]", ["zh"]), ("{a: b}", None),
                            ("no", None), ("[", None)]
)  # fmt: skip
def test_languages_of_an_adapter_s_card(value: str, expected: list[str] | None, tmp_path: Path) -> None:
    """YAML 1.1 reads the code of Norwegian as false."""
    save_adapter(save_tiny_mixtral(tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "adapter/README.md").write_text(f"---\nlanguage: {value}\n---\nAn adapter.", encoding="utf-8")
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), format="peft")
    assert (metadata_load(tmp_path / "out/README.md") or {}).get("language") == expected

"""Names of sources in figures, with a font that has their script and without."""

from pathlib import Path

import matplotlib as mpl
import pytest
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_mixcn.studies.figures import choose_fonts

DEJAVU = Path(mpl.get_data_path(), "fonts/ttf/DejaVuSans.ttf")


@pytest.fixture(autouse=True)
def only_dejavu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave Matplotlib its own font, whatever the machine has."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    font_manager.fontManager.addfont(DEJAVU)


def install(folder: Path, family: str, characters: str) -> None:
    """Add a font that has these characters, drawn as DejaVu's A, and no others."""
    with TTFont(DEJAVU) as font:
        for table in font["cmap"].tables:
            table.cmap = {ord(char): "A" for char in characters}
        for record in font["name"].names:
            if record.nameID in (1, 4, 16):
                record.string = family
        font.save(folder / f"{family}.ttf")
    font_manager.fontManager.addfont(folder / f"{family}.ttf")


def drawn(*names: str) -> Figure:
    """Draw a line and a tick for each name; a glyph that is missing is an error by pytest's settings."""
    figure = Figure()
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for place, name in enumerate(names):
        panel.plot([0, 1], [place, place], label=name)
    panel.set_yticks(range(len(names)), list(names))
    panel.set_title(", ".join(names))
    panel.legend()
    choose_fonts(figure)
    figure.canvas.draw()
    return figure


def texts(figure: Figure) -> list[list[str]]:
    panel = figure.axes[0]
    legend = panel.get_legend()
    assert legend is not None
    return [
        [panel.get_title()],
        [label.get_text() for label in panel.get_yticklabels()],
        [text.get_text() for text in legend.get_texts()],
    ]


def test_names_are_drawn_with_fonts_that_have_their_script(tmp_path: Path) -> None:
    install(tmp_path, "Some Han", "中文简")
    install(tmp_path, "Some Thai", "ไทย")
    install(tmp_path, "Less Han", "中")
    figure = drawn("中文", "ไทย", "fr", "عربي")
    names = ["中文", "ไทย", "fr", "عربي"]
    assert texts(figure) == [[", ".join(names)], names, names]
    assert figure.axes[0].title.get_fontfamily()[1:] == ["Some Thai", "Some Han"]  # most of the characters first


def test_names_that_no_font_has_are_escaped_with_one_warning() -> None:
    with pytest.warns(UserWarning, match=r"has 中 國: figures write them as \\u4e2d \\u570b. Install") as seen:
        figure = drawn("中國 zh")
    assert len(seen) == 1
    assert texts(figure) == [["\\u4e2d\\u570b zh"]] * 3
    assert texts(drawn("中國 zh")) == [["\\u4e2d\\u570b zh"]] * 3  # and a second warning would be an error


def test_a_dollar_is_no_formula() -> None:
    assert texts(drawn("a$b$c\\x"))[1] == ["a$b$c\\x"]


def test_powers_of_an_axis_stay_formulas() -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.plot([512, 4096], [1, 2])
    panel.set_xscale("log", base=2)
    choose_fonts(figure)
    figure.canvas.draw()
    labels = [label for label in panel.get_xticklabels() if label.get_text()]
    assert labels
    assert all(label.get_parse_math() and label.get_text().startswith("$") for label in labels)

"""The report in a real browser: everything is seen, nothing is fetched, nothing is complained of."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_mixcn.cli import main
from tests.sharing.browser import NAMES, Browser, installed_browser

# The run's own figures have the names of its sources, which no font of this machine may have.
pytestmark = pytest.mark.filterwarnings("ignore:No font of this machine has")

VISIBLE = """[...document.querySelectorAll("h1, h2")].map(heading => {
    const place = heading.getBoundingClientRect(), style = getComputedStyle(heading);
    return [heading.textContent, place.width > 0 && place.height > 0 && style.visibility == "visible"];
})"""
# Text may not be painted in the colour of what is below it.
CONTRAST = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = installed_browser()
    if program is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(NAMES)} is installed")
    opened = Browser(program, tmp_path / "profile")
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 1200),
        ("dark", 400),
        pytest.param("light", 400, marks=pytest.mark.slow),
        pytest.param("dark", 1200, marks=pytest.mark.slow),
    ],
)
def test_the_page_is_seen(
    width: int, scheme: str, browser: Browser, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole_run.parent)
    out = tmp_path / "report.html"
    assert main(["report", "run", "--out", str(out)]) == 0
    browser.open(out.as_uri(), width, scheme=scheme)
    headings = browser.value(VISIBLE)
    assert len(headings) == 11
    assert all(seen for _, seen in headings)
    # The page itself never scrolls sideways, tables do.
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    ink, paper = browser.value(CONTRAST)
    assert (sum(map(int, paper[4:-1].split(","))) > sum(map(int, ink[4:-1].split(",")))) == (scheme == "light")
    assert browser.screenshot().startswith(b"\x89PNG")
    fetched = [event["request"]["url"] for method, event in browser.events if method == "Network.requestWillBeSent"]
    assert [address for address in fetched if not address.startswith("data:")] == [out.as_uri()]
    complaints = [event for method, event in browser.events if method in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert not complaints

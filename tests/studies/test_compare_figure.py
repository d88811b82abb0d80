from pathlib import Path

from lightning_mixcn.studies.comparison.results import save_curves


def test_the_same_numbers_give_the_same_picture(tmp_path: Path) -> None:
    results = [
        {"arm": arm, "sources": {name: {"curve": [[0, 3.0], [1e6, 2.5 + seed]]} for name in ("zh", "en")}}
        for arm in ("one", "other")
        for seed in (0, 1)
    ]
    for name in ("first.png", "second.png"):
        save_curves(tmp_path / name, results, "Title")
    first = (tmp_path / "first.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == (tmp_path / "second.png").read_bytes()
    save_curves(tmp_path / "one.png", results[:1], "Title")
    assert (tmp_path / "one.png").read_bytes() != first

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest

from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.data.progress import Order, RunProgress, require_same_order
from lightning_mixcn.errors import UserError

ORDER: Order = {"num_streams": 64, "sources": "zh, en", "weight of source zh": 0.9}


def test_rows_are_counted_from_where_counting_begins() -> None:
    progress = RunProgress()
    assert (progress.rows, progress.state_dict()) == (0, {})
    progress.set_order(dict(ORDER))
    batches = 10
    progress.begin(lambda: batches, rows_a_batch=8)
    assert progress.rows == 0
    batches = 13
    assert progress.state_dict() == {"rows": 24, "streams": {}, "order": ORDER}
    progress.begin(lambda: 2 * batches, rows_a_batch=3)
    assert progress.rows == 24
    batches = 14
    assert progress.rows == 30


def test_a_loaded_state_goes_on() -> None:
    progress = RunProgress()
    progress.set_order(dict(ORDER))
    progress.begin(lambda: 7, rows_a_batch=8)
    progress.load_state_dict({"rows": 100, "streams": {}, "order": ORDER})
    assert progress.rows == 100
    progress.begin(iter([5, 6]).__next__, rows_a_batch=8)
    assert progress.rows == 108


def test_streams_are_those_after_what_was_consumed() -> None:
    """Batches that were handed out ahead are not in the state."""
    progress = RunProgress()
    progress.set_order(dict(ORDER))
    consumed = 0
    progress.begin(lambda: consumed, rows_a_batch=2)
    for position in (1, 2, 3):
        progress.hand_out({0: {"position": position}})
    assert progress.streams == {}
    consumed = 2
    assert progress.streams == {0: {"position": 2}}
    progress.begin(lambda: consumed, rows_a_batch=2)  # the third is made again
    progress.hand_out({1: {"position": 1}})
    assert progress.streams == {0: {"position": 2}}
    consumed = 3
    assert progress.streams == {0: {"position": 2}, 1: {"position": 1}}
    assert progress.rows == 6


def test_the_state_has_the_newest_of_all_ranks() -> None:
    """Another rank knows the streams that it read, and of the others what it once loaded."""
    progress = RunProgress()
    progress.set_order(dict(ORDER))
    progress.load_state_dict({"rows": 6, "streams": {0: {"position": 2}, 1: {"position": 4}}, "order": ORDER})
    theirs = {0: {"position": 5}, 1: {"position": 3}, 7: {"position": 1}}
    state = progress.state_dict(lambda mine: [mine, theirs])
    assert state["streams"] == {0: {"position": 5}, 1: {"position": 4}, 7: {"position": 1}}


@pytest.mark.parametrize("order_first", [True, False])
def test_another_order_is_refused_as_soon_as_it_is_known(order_first: bool) -> None:
    progress = RunProgress()
    steps: list[Callable[[], None]] = [
        lambda: progress.set_order(ORDER | {"num_streams": 32}),
        lambda: progress.load_state_dict({"rows": 1, "streams": {}, "order": ORDER}),
    ]
    first, second = steps if order_first else reversed(steps)
    first()
    with pytest.raises(ValueError, match=r"cannot be continued: `num_streams` was 64 and is 32\. Restore"):
        second()


def test_every_difference_is_named() -> None:
    current: Order = {"num_streams": 64, "sources": "zh", "seed": 1}
    message = r"`sources` was 'zh, en' and is 'zh'; `weight of source zh` was 0.9 and is None; `seed` was None and is 1"
    with pytest.raises(ValueError, match=message):
        require_same_order(ORDER, current)


def test_the_old_order_of_rows_is_refused_with_the_reason() -> None:
    current: Order = {"mixing": "by row number", **ORDER}
    with pytest.raises(ValueError, match=r"trained on the sources in blocks.*`model\.init_args\.adapter`"):
        require_same_order(ORDER, current)


# ---- places of a checkpoint in the sequence ----


def read_rows(arguments: Callable[..., dict[str, Any]], batches: int, **changes: Any) -> PretrainDataModule:
    data = PretrainDataModule(**arguments(**changes))
    data.setup("fit")
    for _ in zip(range(batches), data.train_dataloader(), strict=False):
        pass
    return data


@pytest.mark.parametrize("packing", ["documents", "best_fit", "concatenate"])
@pytest.mark.parametrize("weight_unit", ["tokens", "bytes"])
def test_every_place_of_a_run_is_one(arguments: Callable[..., dict[str, Any]], packing: str, weight_unit: str) -> None:
    """Over several epochs, with rows of three streams left out."""
    settings = {"packing": packing, "weight_unit": weight_unit, "num_streams": 5}
    for batches in (0, 1, 2, 40, 700):
        state = read_rows(arguments, batches, **settings).state_dict()
        assert state["rows"] == 2 * batches
        other = PretrainDataModule(**arguments(**settings))
        other.setup("fit")
        other.load_state_dict(state)
        assert other.state_dict() == state


Change = Callable[[dict[str, Any]], object]
TAMPERED: dict[str, tuple[Change, str]] = {
    "rows": (lambda s: s.update(rows=-4), "rows is -4, expected a whole number"),
    "more rows": (lambda s: s.update(rows=10**6), "stream 0 is at row 10 of its own, expected 125,000"),
    "no rows": (lambda s: s.pop("rows"), "rows is missing"),
    "streams": (lambda s: s.update(streams=[]), "streams is a list of 0 entries, expected a mapping"),
    "no stream": (lambda s: s["streams"].pop(3), "stream 3 is missing"),
    "a ninth stream": (lambda s: s["streams"].update({8: s["streams"][0]}), "there is no stream 8 of 8"),
    "position": (lambda s: s["streams"][2].update(position=10**9), "stream 2 is at row 1,000,000,000 of its own"),
    "empty": (lambda s: s["streams"][1].clear(), r"streams\[1\]\.position is missing"),
    "sources": (lambda s: s["streams"][1].update(served=[1]), "stream 1 has `served` of 1 sources, expected 2"),
    "phase": (lambda s: s["streams"][1].update(phases=[math.nan, 0.0]), r"phases\[0\] is nan, expected a finite"),
    "served": (lambda s: s["streams"][1].update(served=[10**6, 0]), "has given 1,000,000 tokens, more than its rows"),
    "read": (lambda s: s["streams"][1]["read"][0].__setitem__(0, 10**6), "has read 1,000,000 tokens, other than"),
    "document": (lambda s: s["streams"][1].update(documents=[[10**9 + 1, 0]] * 2), "is at document 1,000,000,001, wh"),
    "another's": (lambda s: s["streams"][1].update(documents=[[2, 1]] * 2), "has document 2, which is not dealt to it"),
    "pool": (lambda s: s["streams"][1].update(pools=[[[1, 2, 3]], []]), r"pools\[0\]\[0\] is a list of 3 entries, exp"),
    "order": (lambda s: s.update(order=[1]), "order is a list of 1 entries, expected a mapping"),
}


def test_other_places_are_refused_and_named(arguments: Callable[..., dict[str, Any]]) -> None:
    state = read_rows(arguments, 40).state_dict()
    data = PretrainDataModule(**arguments())
    data.setup("fit")
    for name, (change, fault) in TAMPERED.items():
        tampered = copy.deepcopy(state)
        change(tampered)
        with pytest.raises(UserError, match=fault) as raised:
            data.load_state_dict(tampered)
        assert "\n" not in str(raised.value), name


def test_a_state_that_comes_before_the_corpus_is_compared_with_it(arguments: Callable[..., dict[str, Any]]) -> None:
    state = read_rows(arguments, 40).state_dict()
    state["streams"][2]["position"] = 10**9
    data = PretrainDataModule(**arguments())
    data.load_state_dict(state)
    with pytest.raises(UserError, match="stream 2 is at row 1,000,000,000 of its own"):
        data.setup("fit")


@pytest.mark.parametrize(("packing", "place"), [("documents", "documents"), ("best_fit", "pools")])
def test_a_place_beyond_a_document_is_refused_where_it_is_read(
    arguments: Callable[..., dict[str, Any]], packing: str, place: str
) -> None:
    """It would be sought for ever."""
    state = read_rows(arguments, 40, packing=packing).state_dict()
    for stream in state["streams"].values():
        for entry in stream[place] if place == "documents" else stream[place][0]:
            entry[1] += 10**9
    data = PretrainDataModule(**arguments(packing=packing))
    data.setup("fit")
    data.load_state_dict(state)
    fault = r"is token 1,000,000,\d+ of document \d+ of source '(zh|en)', which has \d+ tokens"
    with pytest.raises(UserError, match=fault):
        list(zip(range(40), data.train_dataloader(), strict=False))

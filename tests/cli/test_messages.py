"""What parsers and libraries say, in one line: never an error of our own in its place."""

import pytest

from lightning_mixcn.cli.messages import libraries_in_one_line, readable
from lightning_mixcn.errors import UserError


@pytest.mark.parametrize("class_path", ["Short", "no.such.Kind", "lightning_mixcn.NoSuchKind", "builtins.dict"])
def test_an_unknown_option_of_a_class_that_cannot_be_imported(class_path: str) -> None:
    message = f"Problem with given class_path '{class_path}': Option 'bas' is not accepted"
    assert readable(message) == message


def test_a_cause_that_was_never_raised_is_reported() -> None:
    with (
        pytest.raises(UserError, match=r"^`the configuration` cannot be made: no number \(MIXCN_TRACEBACK=1 shows"),
        libraries_in_one_line(dict),
    ):
        raise RuntimeError("wrapped") from ValueError("no number")


def test_an_error_of_our_own_with_a_cause_is_let_through() -> None:
    own = UserError("choice.json is not valid JSON")
    own.__cause__ = ValueError("no number")
    with pytest.raises(RuntimeError, match="wrapped"), libraries_in_one_line(dict):
        raise RuntimeError("wrapped") from own

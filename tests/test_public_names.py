import importlib

import pytest

import lightning_mixcn


@pytest.mark.parametrize("name", lightning_mixcn.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(lightning_mixcn, name) is not None
    assert name in dir(lightning_mixcn)


def test_a_public_name_is_the_one_of_its_home() -> None:
    assert lightning_mixcn.load_mixtral is importlib.import_module("lightning_mixcn.model").load_mixtral


def test_another_name_says_which_there_are() -> None:
    with pytest.raises(AttributeError, match="load_mixtral"):
        lightning_mixcn.load_mixtrall  # noqa: B018

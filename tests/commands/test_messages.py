"""What parsers and libraries say, in one line: never an error of our own in its place."""

import pytest

from lightning_mixcn.commands.messages import libraries_in_one_line, readable
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


TREE = """Parser key "{key}":
  Does not validate against any of the Union subtypes
  Subtypes: [list[Callback], <class 'Callback'>, <class 'NoneType'>]
  Errors:
{errors}
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='{inner}', val='{value}')"""


@pytest.mark.parametrize(
    ("key", "errors", "inner", "value", "said"),
    [
        (
            "trainer.callbacks",
            "- Expected a path but X either not accessible or invalid\n- Expected a <class 'list'>\n"
            "- Expected a dot import path string: ExpertLoadMonitr",
            "callbacks",
            "ExpertLoadMonitr",
            "trainer.callbacks: there is no class 'ExpertLoadMonitr' (did you mean 'ExpertLoadMonitor'?). Give one of "
            "lightning_mixcn by its name, another by its full import path",
        ),
        (
            "trainer.callbacks",
            "- Problem with given class_path 'lightning_mixcn.callbacks.ExpertLoadMonitor':\n"
            "    Option 'every_n' is not accepted\n- Problem with given class_path 'lightning.Callback':\n"
            "    Option 'every_n' is not accepted",
            "every_n",
            "3",
            "trainer.callbacks: Problem with given class_path 'lightning_mixcn.callbacks.ExpertLoadMonitor': Option "
            "'every_n' is not accepted (did you mean 'every_n_steps'?)",
        ),
        (
            "trainer.callbacks",
            "- Problem with given class_path 'lightning_mixcn.callbacks.ExpertLoadMon':\n"
            "    module 'lightning_mixcn.callbacks' has no attribute 'ExpertLoadMon'\n" * 2,
            "callbacks",
            "lightning_mixcn.callbacks.ExpertLoadMon",
            "trainer.callbacks: there is no class 'lightning_mixcn.callbacks.ExpertLoadMon' (did you mean "
            "'ExpertLoadMonitor'?). Give one of lightning_mixcn by its name, another by its full import path",
        ),
        (
            "optimizer",
            "- Type typing.Callable[[Iterable], Optimizer] expects a function or a callable class: module 'torch.optim'"
            " has no attribute 'SDG'. Got value: torch.optim.SDG",
            "optimizer",
            "torch.optim.SDG",
            "optimizer: there is no class 'torch.optim.SDG'. Give one of lightning_mixcn by its name, another by its "
            "full import path",
        ),
        (
            "optimizer",
            "- Type typing.Callable[[Iterable], Optimizer] expects a function or a callable class: Option "
            "'weightdecay' is not accepted. Got value: Namespace(class_path='torch.optim.AdamW')",
            "optimizer",
            "1",
            "optimizer: Problem with given class_path 'torch.optim.AdamW': Option 'weightdecay' is not accepted (did "
            "you mean 'weight_decay'?)",
        ),
        (
            "trainer.strategy",
            "- Expected a <class 'str'>\n- Expected a dot import path string: auto",
            "stage",
            "2",
            "trainer.strategy: 'stage' is an option of a class, and 'auto' is none. Name the class before it",
        ),
        (
            "sources",
            "- Expected a dot import path string: zh",
            "sources",
            "zh",
            "sources: expected a mapping such as {name: zh, path: texts/zh}, got 'zh'",
        ),
        (
            "quantization",
            "- Expected a typing.Literal['nf4', 'none']. Got value: nf44",
            "quantization",
            "nf44",
            "quantization: expected nf4 or none, got 'nf44' (did you mean 'nf4'?)",
        ),
        (
            "activation_memory",
            "- Expected a <class 'int'>\n- Expected a typing.Literal['auto']\nGiven value: lots",
            "x",
            "lots",
            "activation_memory: expected a whole number or auto, got 'lots'",
        ),
    ],
)
def test_a_tree_of_attempts_is_one_sentence(key: str, errors: str, inner: str, value: str, said: str) -> None:
    assert readable(TREE.format(key=key, errors=errors, inner=inner, value=value)) == said


def test_an_unknown_choice_and_option_of_a_command_name_the_nearest() -> None:
    choice = "argument subcommand: invalid choice: 'trian' (choose from 'train', 'merge', 'report')"
    assert readable(choice) == f"{choice} (did you mean 'train'?)"
    option = "unrecognized arguments: --dtyp=x"
    assert readable(option, ["--dtype", "--seed"]) == f"{option} (did you mean '--dtype'?)"
    assert readable("unrecognized arguments: --zzz", ["--dtype"]) == "unrecognized arguments: --zzz"

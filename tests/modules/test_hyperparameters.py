"""Arguments as plain data."""

from peft import LoraConfig

from lightning_mixcn.modules.state import plain_arguments


def test_lora_is_reduced_to_what_was_set() -> None:
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["w3", "w1"], rank_pattern={"w1": 2})
    assert plain_arguments({"lora": lora}) == {
        "lora": {"r": 4, "lora_dropout": 0.1, "target_modules": ["w1", "w3"], "rank_pattern": {"w1": 2}}
    }


def test_plain_values_stay_and_callables_go() -> None:
    arguments = {"a": 1, "b": (1, "x"), "c": {"d": None}, "e": 0.5, "f": True, "g": print}
    assert plain_arguments(arguments) == {"a": 1, "b": [1, "x"], "c": {"d": None}, "e": 0.5, "f": True}

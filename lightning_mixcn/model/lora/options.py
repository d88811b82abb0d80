"""Check the options of PEFT's `LoraConfig`. One that is not implemented is refused by name, so that none is ignored.

The lists say what is implemented, and all fields of the installed PEFT's configuration are compared with them: an
option of a later release is refused until it is listed.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, TypedDict

from peft import LoraConfig, PeftType

from lightning_mixcn.arguments import Between, Name, check_arguments
from lightning_mixcn.errors import UserError

_IMPLEMENTED = frozenset({
    "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # About the folder, not the method. `base_model_name_or_path` is set to the base that is loaded.
    "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode",
})  # fmt: skip
# Options that change neither what an adapter's tensors mean nor how they are named: which tensors there are says the
# file itself, and a start (checked apart) is over once an adapter is saved.
_IRRELEVANT_ONCE_SAVED = frozenset({
    "modules_to_save", "target_parameters", "ensure_weight_tying", "bias", "revision", "runtime_config",
    "eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_core", "qalora_group_size",
})  # fmt: skip

_STARTS = (True, False, "gaussian")
# Starts that leave the base as it is, so that what was saved is plain LoRA; PEFT subtracts the others from the base.
# A file's null is no start at all.
_STARTS_BESIDE_THE_BASE = (*_STARTS, None, "eva", "orthogonal", "mica")

_INSTEAD = {
    "modules_to_save": "Set `train_embeddings: true` to train embed_tokens and lm_head",
    "ensure_weight_tying": "Leave it out: `train_embeddings: true` keeps a tied pair tied",
    "trainable_token_indices": "Set `train_embeddings: true`, which trains every row",
    "target_parameters": "Name w1, w2, w3 and gate in `target_modules`",
    "bias": "The model has no biases. Leave it out",
    "revision": "Give the folder of that revision as `base`",
}


_RANK = Between(1, 2**16, "(a rank such as 64; `lora: null` trains none)")
_ALPHA = Between(0, 10**6, "(it scales the update: e.g. twice the rank)", excluded=(0,))
_Rank = Annotated[int, _RANK]
_Alpha = Annotated[float, _ALPHA]
_Layer = Annotated[int, Between(0, 10**4)]
_Names = Name | list[Name] | set[Name]


class TrainedOptions(TypedDict):
    """Values of the implemented options of `LoraConfig`; its own hints have no bounds."""

    r: _Rank
    lora_alpha: _Alpha
    rank_pattern: dict[str, _Rank] | None
    alpha_pattern: dict[str, _Alpha] | None
    lora_dropout: Annotated[float, Between(0, 1, "(e.g. 0.05)", excluded=(1,))]
    use_rslora: bool
    target_modules: _Names | None
    exclude_modules: _Names | None
    layers_to_transform: _Layer | list[_Layer] | None
    layers_pattern: _Names | None


def check_training_options(config: LoraConfig) -> None:
    """Refuse a configuration that asks for more than plain LoRA or rsLoRA.

    Args:
        config: The configuration as the user gave it.

    Raises:
        ValueError: an option has another value than its default and is not implemented, or its value is not.
    """
    if config.peft_type != PeftType.LORA:
        raise UserError(
            f"`lora` is of type {PeftType(config.peft_type).value!r}, expected a peft.LoraConfig of type 'LORA'"
        )
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in _unusual(options, _IMPLEMENTED):
        instead = _INSTEAD.get(name, "Leave it out: plain LoRA and rsLoRA are implemented")
        raise UserError(f"`lora.{name}={value!r}` is not supported here. {instead}")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(f"`lora.task_type={config.task_type!r}`: expected CAUSAL_LM. Leave it out")
    if config.init_lora_weights not in _STARTS:
        raise UserError(f"`lora.init_lora_weights={config.init_lora_weights!r}`: expected true, false or gaussian")
    check_arguments(TrainedOptions, options, "lora.")


def check_stored_options(raw: dict[str, Any], where: str) -> None:
    """Refuse an adapter on disk whose tensors are not the factors of plain LoRA or rsLoRA on the base that it names.

    Args:
        raw: Content of its ``adapter_config.json``: PEFT drops the keys that it does not know.
        where: The argument that named it, for messages.

    Raises:
        ValueError: another method, an option that is not implemented, a start that changed the base, or a value that
            is no rank or scale.
    """
    if (kind := raw.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"{where} is of type {kind}. Give a LoRA adapter")
    for name, value in _unusual(raw, _IMPLEMENTED | _IRRELEVANT_ONCE_SAVED):
        raise UserError(
            f"{where} was trained with {name}={value!r}, which is not supported here. Give a plain LoRA adapter"
        )
    start = raw.get("init_lora_weights", True)
    if start not in _STARTS_BESIDE_THE_BASE:
        raise UserError(
            f"{where} was started with init_lora_weights={start!r}, which changed the base, so that "
            "its factors do not belong to the base as it is published. Save it in PEFT as plain LoRA: "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…), or merge it there"
        )
    _check_stored_values(raw, where)


def _check_stored_values(raw: Mapping[str, Any], where: str) -> None:
    values = {**dataclasses.asdict(LoraConfig()), **raw}
    patterns = [(name, values[name]) for name in ("rank_pattern", "alpha_pattern")]
    _check_values(where, "an object or null", lambda value: isinstance(value, dict | None), patterns)
    _check_values(where, "true or false", lambda value: isinstance(value, bool), [("use_rslora", values["use_rslora"])])
    _check_values(where, "a whole number of at least 1", _is_rank, _with_pattern(values, "r", "rank_pattern"))
    _check_values(where, "a finite number", _is_finite, _with_pattern(values, "lora_alpha", "alpha_pattern"))


def _check_values(
    where: str, expected: str, is_valid: Callable[[Any], bool], values: Iterable[tuple[str, Any]]
) -> None:
    for name, value in values:
        if not is_valid(value):
            raise UserError(f"{where}: adapter_config.json has {name}={value!r}, expected {expected}. Copy it again")


def _with_pattern(options: Mapping[str, Any], name: str, pattern: str) -> Iterator[tuple[str, Any]]:
    """Yield name and value of an option and of each entry of its pattern."""
    yield name, options[name]
    for key, value in (options[pattern] or {}).items():
        yield f"{pattern}[{key!r}]", value


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _RANK.most


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unusual(options: Mapping[str, Any], listed: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of what differs from PEFT's default and is not listed; null, empty and false are alike."""
    default = LoraConfig()
    for name, value in options.items():
        usual = getattr(default, name, None)
        if name not in listed and value != usual and (value or usual):
            yield name, value
